"""Bytes <-> Adapter: one codec a file, chosen here by what lies on disk.

Codecs know files and tensors, never a model. Reading is strict: a file is read whole and checked,
or refused with one typed error that names file, field and fix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from hf_lora.adapter import MODEL, Adapter, check_component
from hf_lora.errors import AdapterNotFound, BadAdapterFile, InvalidOption, LoraError, listing
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats import foreign, kohya, peft
from hf_lora.formats.container import DAMAGED, Contents, read_safetensors
from hf_lora.formats.disk import inside, replace_files
from hf_lora.formats.foreign import NamesOf
from hf_lora.formats.header import CHECKS, Steps
from hf_lora.formats.names import Names
from hf_lora.limits import DEFAULT_LIMITS, LoadLimits
from hf_lora.manifest import KEY

__all__ = ["CHECKS", "NamesOf", "checks", "read_adapter", "read_header", "write_adapter"]

LAYOUTS = {"peft": peft.files_of, "diffusers": diffusers.files_of}
# Layouts that name modules as the original repositories do, so the host's names are needed.
FOREIGN = {
    "kohya": partial(kohya.files_of, comfy=False),
    "comfyui": partial(kohya.files_of, comfy=True),
}
SUFFIX = ".safetensors"
# Ends of names by which people mean a file. Others, as in `style-v1.5`, are part of a folder's.
_FILE_LIKE = frozenset({SUFFIX, ".sft", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".txt"})
_UNBOUND = LoadLimits(scaling=1e300, value=1e300)  # who writes an adapter has accepted its size
_READS = 5  # how often a file is read again that a save replaces meanwhile
# What a layout's folder holds, the one with the most files first.
FILES = ((peft.CONFIG, peft.WEIGHTS), (diffusers.WEIGHTS,))


def read_adapter(
    source: str | os.PathLike[str],
    *,
    limits: LoadLimits | None = None,
    names_of: NamesOf | None = None,
    strict: bool = True,
) -> Adapter:
    """Reads an adapter with all its tensors, checked; see `hf_lora.open_adapter`.

    Args:
        source: A folder or file.
        limits: Bounds on what is read.
        names_of: Finds the host's names for the modules of other programs' files; without it such
            files are refused.
        strict: With False, keys of such files that lead nowhere are left out.
    """
    return _read(source, limits, names_of, strict=strict, header_only=False)


def read_header(
    source: str | os.PathLike[str],
    *,
    limits: LoadLimits | None = None,
    names_of: NamesOf | None = None,
    strict: bool = True,
) -> Adapter:
    """Reads config and file header only; the adapter's tensors lie on the meta device.

    The digest is what the file states, not computed.
    """
    return _read(source, limits, names_of, strict=strict, header_only=True)


def _read(
    source: str | os.PathLike[str],
    limits: LoadLimits | None,
    names_of: NamesOf | None,
    *,
    strict: bool,
    header_only: bool,
) -> Adapter:
    """Reads again what a save replaces meanwhile, so that no file is read with another's config."""
    weights = weights_of(source)
    for _ in range(_READS):
        before = _stamp(weights)
        try:
            adapter = run(checks(source, limits, names_of, strict=strict, header_only=header_only))
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


def run(steps: Steps) -> Adapter:
    """Makes all checks and returns the adapter."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            adapter: Adapter = done.value
            return adapter


def checks(
    source: str | os.PathLike[str],
    limits: LoadLimits | None = None,
    names_of: NamesOf | None = None,
    *,
    strict: bool = True,
    header_only: bool = False,
) -> Steps:
    """Reads an adapter check by check: yields (name of the check, what it found), see `CHECKS`.

    Raises what `read_adapter` raises, at the check that fails.
    """
    limits = checked_limits(limits)
    weights = weights_of(source)
    contents = read_safetensors(weights, limits, header_only=header_only)
    yield "file", f"{len(contents.tensors)} tensors, every byte accounted for"
    try:
        layout = layout_of(contents, weights, names_of)
        if layout == "peft":
            return (yield from peft.steps(contents, weights, limits))
        if layout == "diffusers":
            return (yield from diffusers.steps(contents, weights, limits))
        return (yield from foreign.steps(contents, weights, limits, names_of, strict=strict))
    except LoraError as error:
        raise error.within(file=str(weights), fix=DAMAGED) from None


def layout_of(contents: Contents, weights: Path, names_of: NamesOf | None = None) -> str:
    """Returns whose layout a file has: `"peft"`, `"diffusers"`, or empty for another program's.

    The words of peft and diffusers may stand before the names of a model's makers, which neither
    of the two writes; then it is another program's. So is a file whose header is of diffusers and
    whose keys are not.
    """
    if weights.name == peft.WEIGHTS:
        return "peft"
    if any(key.startswith(peft.PREFIX) for key in contents.tensors):
        layout = "peft"
    elif diffusers.is_own(contents):
        layout = "diffusers"
    else:
        return ""
    known = KEY in contents.metadata or not foreign.has_makers_names(contents, names_of)
    return layout if known else ""


def checked_limits(limits: object) -> LoadLimits:
    """Returns the limits in force; InvalidOption for what are none."""
    if limits is None:
        return DEFAULT_LIMITS
    if not isinstance(limits, LoadLimits):
        raise InvalidOption(
            f"limits is a {type(limits).__name__}", fix="Give LoadLimits(...).", field="limits"
        )
    return limits


def write_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    host: Mapping[str, Names] | None = None,
) -> Path:
    """Writes an adapter as files; see `hf_lora.save_adapter`.

    Args:
        adapter: What to write.
        path: The folder, made when missing; for layouts of one file also that file.
        layout: One of `LAYOUTS` or `FOREIGN`; left out, the one for the adapter's components.
        host: Names of the host, for one of `FOREIGN`.
    """
    if not isinstance(adapter, Adapter):
        raise InvalidOption(
            f"a {type(adapter).__name__} is no Adapter",
            fix="Use save_lora(host, path) for a model or pipeline.",
            field="adapter",
        )
    layout = layout or ("peft" if set(adapter.components) == {MODEL} else "diffusers")
    check_layout(layout)
    given = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
    if not given or "\0" in given:
        raise InvalidOption(f"path={path!r} is no path", field="path")
    target = Path(given)
    _check_suffix(target, layout)
    one_file = layout != "peft" and target.suffix == SUFFIX and not target.is_dir()
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
    if layout in FOREIGN:
        if host is None:
            raise InvalidOption(
                f"the layout {layout} needs the names of the pipeline it is for", field="host"
            )
        replace_files(FOREIGN[layout](adapter, target, host))
    else:
        replace_files(LAYOUTS[layout](adapter, target))
    return target


def _check_suffix(target: Path, layout: str) -> None:
    """Raises InvalidOption for a name of a file that a layout does not have, such as `x.bin`."""
    suffix = target.suffix.lower()
    if (
        target.is_dir()
        or suffix not in _FILE_LIKE
        or (layout != "peft" and target.suffix == SUFFIX)
    ):
        return
    if layout == "peft":
        fact, fix = "a peft adapter is a folder of two files", "Give the name of a folder."
    else:
        fact, fix = f"{layout} files end in {SUFFIX}", f"Give a folder or a name in {SUFFIX}."
    raise InvalidOption(f"{target.name} is the name of a file, and {fact}", fix=fix, field="path")


def check_layout(layout: object) -> None:
    """Raises InvalidOption for what is no layout."""
    known = (*LAYOUTS, *FOREIGN)
    if not isinstance(layout, str) or layout not in known:
        raise InvalidOption(
            f"unknown layout {layout!r}", fix=f"Use one of {sorted(known)}.", field="layout"
        )


def weights_of(source: str | os.PathLike[str]) -> Path:
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
