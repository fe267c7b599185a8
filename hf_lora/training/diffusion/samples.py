"""Pictures that the pipeline in training draws of fixed prompts, from fixed noise."""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_lora.errors import InvalidOption, LoraError, TrainingError, listing, shown
from hf_lora.formats.disk import Files, replace_files
from hf_lora.hosts import model_of
from hf_lora.training.diffusion.inputs import Inputs
from hf_lora.training.diffusion.sheet import sheet
from hf_lora.training.samples import Prompt, board, write_rows

FOLDER = "samples"
SHEET = "samples.png"

_NAME = "step-{step:06d}-{number}.png"
_NAMES = re.compile(r"step-(\d{6,})-(\d+)\.png")
_SIDE = 8  # pixels, of which pipelines want heights and widths to be multiples
_REHEARSED = 2  # steps, in which all that can go wrong goes wrong


def _whole(least: int, most: float) -> tuple[Callable[[object], bool], str]:
    def sound(value: object) -> bool:
        return type(value) is int and least <= value <= most

    return sound, f"a whole number of {least} or more"


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


# Option of a sample -> is a value sound, and what it must be. All but the seed go to the pipeline.
OPTIONS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "seed": _whole(0, 2**63 - 1),
    "negative_prompt": (lambda value: isinstance(value, str), "a text"),
    "num_inference_steps": _whole(1, math.inf),
    "guidance_scale": (_is_number, "a number of 0 or more"),
    "true_cfg_scale": (_is_number, "a number of 0 or more"),
    "height": _whole(1, math.inf),
    "width": _whole(1, math.inf),
}


class Drawings:
    """The pictures of a run.

    Args:
        inputs: What the pipeline in training takes.
        prompts: Texts, and texts with options. Seeds that are not given count from 0.

    Raises:
        TrainingError: A prompt is a chat.
        InvalidOption: A prompt has an option that the pipeline does not take, or a value that
            cannot be.
    """

    def __init__(self, inputs: Inputs, prompts: Sequence[Prompt]) -> None:
        self._inputs = inputs
        taken = inspect.signature(inputs.pipe.__call__).parameters
        known = [name for name in OPTIONS if name == "seed" or name in taken]
        self._samples = [_sample(prompt, i, known) for i, prompt in enumerate(prompts)]
        self._common: dict[str, Any] = {}
        if inputs.longest is not None and "max_sequence_length" in taken:
            self._common["max_sequence_length"] = inputs.longest  # as captions are in training

    def check(self) -> None:
        """Finds out whether all can be drawn: prompts, sizes, then two steps of each.

        Raises:
            TrainingError: The pipeline lacks a part, a prompt is too long, or drawing fails.
            InvalidOption: A height or width cannot be drawn.
        """
        pipe, kind = self._inputs.pipe, self._inputs.kind
        readers = [name.replace("text_encoder", "tokenizer") for name in kind.encoders]
        needed = ("vae", "scheduler", *kind.encoders, *readers)
        lacking = [name for name in needed if getattr(pipe, name, None) is None]
        if lacking:
            raise TrainingError(
                f"{type(pipe).__name__} has no {listing(lacking)}, so it cannot draw the samples",
                fix="Load it whole, or leave samples= out.",
                field="samples",
            )
        for sample in self._samples:
            self._check_sample(sample)
        for sample in self._samples:
            steps = min(_REHEARSED, sample.get("num_inference_steps", _REHEARSED))
            self._rehearse({**sample, "num_inference_steps": steps})

    def _check_sample(self, sample: Mapping[str, Any]) -> None:
        texts = [sample[key] for key in ("prompt", "negative_prompt") if key in sample]
        try:
            self._inputs.tokenize(texts)
        except LoraError as error:
            raise TrainingError(
                f"{shown(sample['prompt'])} of the samples cannot be drawn: {error.fact}",
                fix=error.fix,
                field="samples",
            ) from None
        side = math.lcm(_SIDE, self._inputs.factor * self._inputs.kind.multiple)
        for key in ("height", "width"):
            if sample.get(key, side) % side:
                raise InvalidOption(
                    f"{key}={sample[key]} of the samples is no multiple of {side} pixels",
                    field="samples",
                )

    def _rehearse(self, sample: Mapping[str, Any]) -> None:
        try:
            self._draw([sample])
        except Exception as error:  # a pipeline raises what it likes
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise TrainingError(
                f"{type(self._inputs.pipe).__name__} cannot draw {shown(sample['prompt'])} of the "
                f"samples ({why})",
                fix="Call the pipeline with this prompt and these options, or leave samples= out.",
                field="samples",
            ) from error

    def write(self, step: int, args: Any) -> None:
        """Draws and writes PNG files, rows, a sheet of all steps, and to TensorBoard."""
        folder = Path(args.output_dir)
        pictures = self._draw(self._samples)
        names = [_NAME.format(step=step, number=i) for i in range(len(pictures))]
        files = {name: [_png(p)] for name, p in zip(names, pictures, strict=True)}
        replace_files(Files(folder / FOLDER, files))
        rows = [
            {**sample, "file": f"{FOLDER}/{name}"}
            for sample, name in zip(self._samples, names, strict=True)
        ]
        write_rows(folder, step, rows)
        drawn = _drawn(folder / FOLDER, step, names)
        prompts = [sample["prompt"] for sample in self._samples]
        replace_files(Files(folder, {SHEET: [_png_of(sheet(drawn, prompts))]}))
        writer = board(args, folder)
        if writer is not None:
            for i, picture in enumerate(pictures):
                writer.add_image(f"samples/{i}", picture, step, dataformats="HWC")
            writer.flush()

    @torch.no_grad()
    def _draw(self, samples: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """Returns pictures, bytes (height, width, 3)."""
        pictures = []
        with _twin(self._inputs) as pipe:
            for sample in samples:
                call = {key: value for key, value in sample.items() if key != "seed"}
                # on the CPU, where noise is the same on every machine
                generator = torch.Generator().manual_seed(sample["seed"])
                found = pipe(**self._common, **call, generator=generator, output_type="np")
                # what is no number is black
                values = np.nan_to_num(found.images[0], nan=0.0, posinf=1.0, neginf=0.0)
                pictures.append((values * 255).round().astype(np.uint8))
        return pictures


def _sample(prompt: Prompt, number: int, known: Sequence[str]) -> dict[str, Any]:
    """Returns prompt, seed and other options of a sample, checked by themselves."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "seed": number}
    if not isinstance(prompt, Mapping):
        raise TrainingError(
            f"{shown(prompt)} of the samples is a chat, and a pipeline draws texts",
            fix='Give the text, or {"prompt": text, "seed": 3}.',
            field="samples",
        )
    for key, value in prompt.items():
        if key != "prompt" and key not in known:
            raise InvalidOption(
                f"{shown(key)} in samples is no option of this pipeline",
                fix=f"Options are {listing(known, limit=len(known))}.",
                field="samples",
            )
        if key != "prompt" and not OPTIONS[key][0](value):
            raise InvalidOption(
                f"{key}={shown(value)} in samples is not {OPTIONS[key][1]}", field="samples"
            )
    return {"seed": number, **prompt}


# --- the pipeline, left as it was ----------------------------------------------------------------


@contextmanager
def _twin(inputs: Inputs) -> Iterator[Any]:
    """Gives a pipeline of the same parts to draw with, so that the run is the same without.

    The scheduler, which a call changes, is a copy. Modes and places of the parts and the random
    states are afterwards as before.
    """
    pipe, device = inputs.pipe, inputs.device
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    twin.set_progress_bar_config(disable=True)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    with ExitStack() as after:
        devices = [device] if device.type == "cuda" else []
        after.enter_context(torch.random.fork_rng(devices=devices))
        for part in parts:
            _bring(part, device, after)
        _let_fit(inputs, parts, after)
        after.callback(_put_back, modes)
        for part in parts:
            part.eval()
        yield twin


def _put_back(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _bring(part: nn.Module, device: torch.device, after: ExitStack) -> None:
    """Brings a part to a device, and afterwards back; one that is offloaded comes by itself."""
    first = next(part.parameters(), None)
    if first is not None and first.device != device and not hasattr(part, "_hf_hook"):
        after.callback(part.to, first.device)
        part.to(device)


def _let_fit(inputs: Inputs, parts: Sequence[nn.Module], after: ExitStack) -> None:
    """Casts what denoiser and VAE are given where the parts of a pipeline are of several dtypes.

    A pipeline hands over what the text encoder made, and the VAE what the denoiser made.
    """
    dtypes = {p.dtype for part in parts for p in _floats(part)}
    if len(dtypes) == 1:
        return
    vae: Any = model_of(inputs.pipe.vae)
    inner = [getattr(vae, name, None) for name in ("post_quant_conv", "decoder")]
    for part in (inputs.denoiser, *(part for part in inner if part is not None)):
        after.callback(part.register_forward_pre_hook(_cast, with_kwargs=True).remove)


def _cast(part: nn.Module, args: Any, kwargs: Any) -> Any:
    first = next(_floats(part), None)
    return (args, kwargs) if first is None else _as(first.dtype, (args, kwargs))


def _floats(part: nn.Module) -> Iterator[nn.Parameter]:
    """Yields base weights that are numbers; factors may be wider."""
    return (p for p in part.parameters() if not p.requires_grad and p.is_floating_point())


def _as(dtype: torch.dtype, value: Any) -> Any:
    """Returns tensors in a dtype, in tuples and dicts too; timesteps, of one axis, stay exact."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, Mapping):
        return {key: _as(dtype, one) for key, one in value.items()}
    return tuple(_as(dtype, one) for one in value) if type(value) is tuple else value


# --- files --------------------------------------------------------------------------------------


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    return _png_of(Image.fromarray(picture))


def _png_of(image: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, format="PNG")
    return held.getvalue()


def _drawn(folder: Path, step: int, names: Sequence[str]) -> dict[tuple[int, int], Path]:
    """Returns (step, number of the prompt) -> picture.

    Pictures of later steps are deleted: they are of a run that was interrupted.
    """
    found = {}
    for path in folder.iterdir():
        match = _NAMES.fullmatch(path.name)
        if match is None:
            continue
        at = int(match[1]), int(match[2])
        if at[0] < step or path.name in names:
            found[at] = path
        else:
            path.unlink()
    return found
