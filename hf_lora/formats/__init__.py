"""Bytes <-> Adapter: one codec a file, chosen here by what lies on disk.

Codecs know files and tensors, never a model. Reading is strict: a file is read whole and checked,
or refused with one typed error that names file, field and fix.
"""

from __future__ import annotations

import os
from pathlib import Path

from hf_lora.adapter import MODEL, Adapter, check_component
from hf_lora.errors import AdapterNotFound, BadAdapterFile, InvalidOption, LoraError, listing
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats import peft
from hf_lora.formats.container import DAMAGED, read_safetensors
from hf_lora.formats.disk import inside, replace_files
from hf_lora.formats.header import CHECKS, Steps
from hf_lora.limits import DEFAULT_LIMITS, LoadLimits

__all__ = ["CHECKS", "checks", "open_adapter", "read_header", "save_adapter"]

LAYOUTS = {"peft": peft.files_of, "diffusers": diffusers.files_of}
SUFFIX = ".safetensors"
_UNBOUND = LoadLimits(scaling=1e300, value=1e300)  # who writes an adapter has accepted its size
_READS = 5  # how often a file is read again that a save replaces meanwhile
# What a layout's folder holds, the one with the most files first.
FILES = ((peft.CONFIG, peft.WEIGHTS), (diffusers.WEIGHTS,))


def open_adapter(
    source: str | os.PathLike[str] | Adapter, *, limits: LoadLimits | None = None
) -> Adapter:
    """Reads an adapter with all its tensors, checked.

    Args:
        source: A peft folder (`adapter_config.json` and `adapter_model.safetensors`), a folder with
            `pytorch_lora_weights.safetensors`, a safetensors file, or an `Adapter`, which comes
            back as it is.
        limits: Bounds on what is read.

    Returns:
        The adapter, tensors on the CPU in the file's dtypes.

    Raises:
        AdapterNotFound: There is nothing at `source`, or no adapter in it.
        BadAdapterFile: A file is truncated, over a limit, altered since it was made, not
            understood, or holds values that cannot be right.
        AdapterMismatch: Config and tensors contradict each other.
    """
    return source if isinstance(source, Adapter) else _read(source, limits, header_only=False)


def read_header(source: str | os.PathLike[str], *, limits: LoadLimits | None = None) -> Adapter:
    """Reads config and file header only; the adapter's tensors lie on the meta device.

    The digest is what the file states, not computed.
    """
    return _read(source, limits, header_only=True)


def _read(
    source: str | os.PathLike[str], limits: LoadLimits | None, *, header_only: bool
) -> Adapter:
    """Reads again what a save replaces meanwhile, so that no file is read with another's config."""
    weights = _weights(source)
    for _ in range(_READS):
        before = _stamp(weights)
        try:
            adapter = _read_once(source, limits, header_only=header_only)
        except LoraError:
            if _stamp(weights) == before:
                raise
        else:
            if _stamp(weights) == before:
                return adapter
    raise BadAdapterFile(f"it was replaced {_READS} times while it was read", file=str(weights))


def _stamp(path: Path) -> tuple[int, ...]:
    """Returns what a file under the same name differs in from the one before."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_once(
    source: str | os.PathLike[str], limits: LoadLimits | None, *, header_only: bool
) -> Adapter:
    steps = checks(source, limits, header_only=header_only)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            adapter: Adapter = done.value
            return adapter


def checks(
    source: str | os.PathLike[str], limits: LoadLimits | None = None, *, header_only: bool = False
) -> Steps:
    """Reads an adapter check by check: yields (name of the check, what it found), see `CHECKS`.

    Raises what `open_adapter` raises, at the check that fails.
    """
    limits = checked_limits(limits)
    weights = _weights(source)
    contents = read_safetensors(weights, limits, header_only=header_only)
    yield "file", f"{len(contents.tensors)} tensors, every byte accounted for"
    of_peft = any(key.startswith(peft.PREFIX) for key in contents.tensors)
    of_peft = of_peft or weights.name == peft.WEIGHTS
    try:
        codec = peft.steps if of_peft else diffusers.steps
        return (yield from codec(contents, weights, limits))
    except LoraError as error:
        raise error.within(file=str(weights), fix=DAMAGED) from None


def checked_limits(limits: object) -> LoadLimits:
    """Returns the limits in force; InvalidOption for what are none."""
    if limits is None:
        return DEFAULT_LIMITS
    if not isinstance(limits, LoadLimits):
        raise InvalidOption(
            f"limits is a {type(limits).__name__}", fix="Give LoadLimits(...).", field="limits"
        )
    return limits


def save_adapter(
    adapter: Adapter, path: str | os.PathLike[str], *, layout: str | None = None
) -> Path:
    """Writes an adapter as files that plain peft, transformers and diffusers load.

    Files are written aside, synced and renamed together, so a broken write leaves the old adapter
    whole. The header carries the manifest, with a fresh digest.

    Args:
        adapter: What to write.
        path: The folder, made when missing; for the diffusers layout also a `.safetensors` file.
        layout: `"peft"` or `"diffusers"`; left out, the one for the adapter's components.

    Returns:
        The folder or file.

    Raises:
        InvalidOption: The layout is unknown or `path` is a file.
        BadAdapterFile: The adapter could not be read back, or holds what this layout cannot carry.
        AdapterMismatch: Its config and tensors contradict each other.
        OSError: The files cannot be written; old ones are as they were.
    """
    if not isinstance(adapter, Adapter):
        raise InvalidOption(
            f"a {type(adapter).__name__} is no Adapter",
            fix="Use save_lora(host, path) for a model or pipeline.",
            field="adapter",
        )
    layout = layout or ("peft" if set(adapter.components) == {MODEL} else "diffusers")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise InvalidOption(
            f"unknown layout {layout!r}", fix=f"Use one of {sorted(LAYOUTS)}.", field="layout"
        )
    given = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
    if not given or "\0" in given:
        raise InvalidOption(f"path={path!r} is no path", field="path")
    target = Path(given)
    one_file = layout == "diffusers" and target.suffix == SUFFIX and not target.is_dir()
    if one_file and target.name == peft.WEIGHTS:
        raise InvalidOption(
            f"{peft.WEIGHTS} is the name of a model's adapter, and this is a pipeline's",
            fix="Choose another name, for instance style.safetensors.",
            field="path",
        )
    for name, component in adapter.components.items():
        try:
            check_component(component, _UNBOUND)
        except LoraError as error:
            raise error.within(file="adapter", field=name) from None
    folder = target.parent if one_file else target
    if folder.exists() and not folder.is_dir():
        raise InvalidOption(f"{folder} is a file", fix="Give a folder to save into.", field="path")
    replace_files(LAYOUTS[layout](adapter, target))
    return target


def _weights(source: str | os.PathLike[str]) -> Path:
    """Returns the weights file that a folder holds, or the file that was given."""
    if not isinstance(source, str | os.PathLike) or len(os.fspath(source)) >= 4096:
        raise AdapterNotFound(
            f"{str(source)[:200]!r} is no path of a file or folder",
            fix="Give the folder or file that holds the adapter.",
        )
    path = Path(os.fsdecode(source))
    try:
        if path.is_dir():
            return _in_folder(path)
        present = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a loop of links
        why = getattr(error, "strerror", None) or error
        raise AdapterNotFound(
            f"{str(path)[:200]!r} cannot be looked up ({why})",
            fix="Give the folder or file that holds the adapter.",
        ) from None
    if not present:
        raise AdapterNotFound(
            f"there is no file or folder {str(source)[:200]!r}",
            fix='A Hub repository is read by load_lora(host, "user/name").',
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise BadAdapterFile(
            f"{path.suffix} files are pickles, which can run code, and are not read",
            fix="Convert it to safetensors in a place where that does not matter.",
            file=str(path),
        )
    return path


def _in_folder(folder: Path) -> Path:
    """Finds the one adapter of a folder by the names that layouts use, else by the suffix."""
    standard = [n for n in (peft.WEIGHTS, diffusers.WEIGHTS) if _there(folder / n)]
    names = standard or sorted(p.name for p in folder.glob(f"*{SUFFIX}") if _there(p))
    if len(names) > 1:
        raise BadAdapterFile(
            f"the folder holds {len(names)} adapters: {listing(names)}",
            fix=f"Name one: file={names[0]!r}.",
            file=str(folder),
        )
    if names:
        return inside(folder, names[0])
    pickled = [p.name for p in folder.glob("*.bin")]
    raise AdapterNotFound(
        f"the folder holds no {' and no '.join(' with '.join(names) for names in FILES)}"
        + (f" ({pickled[0]} is a pickle, which can run code, and is not read)" if pickled else ""),
        fix="Save the adapter again as safetensors."
        if pickled
        else "Give the folder that holds them, or the file itself.",
        file=str(folder),
    )


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()
