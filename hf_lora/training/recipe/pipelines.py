"""The base of a run that is a pipeline: laid out from its configs, or with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_lora.errors import LoraError, UnsupportedHost, listing
from hf_lora.formats.container import read_json
from hf_lora.limits import DEFAULT_LIMITS
from hf_lora.skeletons import CONFIG, INDEX, laid_out
from hf_lora.training.diffusion import DiffusionTrainingModule
from hf_lora.training.recipe.models import first_line
from hf_lora.training.recipe.table import Recipe

# What a run neither trains nor calls.
_IDLE = ("safety_checker", "feature_extractor", "image_encoder")
# What says how a pipeline is built and how captions are read: all but the weights.
_PLAN = (INDEX, f"*/{CONFIG}", "scheduler/*", "tokenizer*/*")


def is_pipeline(recipe: Recipe) -> bool:
    """Tells whether the base is a pipeline of diffusers; False where that cannot be found out."""
    folder = Path(str(recipe.model))
    if folder.exists():
        return (folder / INDEX).is_file()
    return _downloaded(recipe, INDEX) is not None


def _downloaded(recipe: Recipe, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(recipe.model), name, revision=recipe.revision))
    except Exception:  # what reads models says what is wrong with the name or the connection
        return None


def configs_of(recipe: Recipe) -> tuple[Path, str | None]:
    """Returns a folder with the configs and tokenizers of a pipeline, and its commit.

    Raises:
        UnsupportedHost: They cannot be downloaded.
    """
    folder = Path(str(recipe.model))
    if folder.exists():
        return folder, None
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            str(recipe.model), revision=recipe.revision, allow_patterns=list(_PLAN)
        )
    except Exception as error:  # the client passes on what its transport raises
        raise _unfit(recipe, error) from None
    return Path(found), Path(found).name


def laid_out_pipeline(recipe: Recipe, folder: Path) -> Any:
    """Returns the pipeline with its models on the meta device: shapes, tokenizers, scheduler.

    Args:
        recipe: With the base's name, for errors.
        folder: From `configs_of`.

    Raises:
        UnsupportedHost: The configs make no pipeline.
    """
    index = read_json(folder / INDEX, DEFAULT_LIMITS)
    if not isinstance(index, dict):
        raise UnsupportedHost(f"{INDEX} is no object", file=str(folder), field="model")
    # transformers makes a tokenizer that knows nothing where there is no folder
    lacks = [part for part in _present(index) if not (folder / part).is_dir()]
    if lacks:
        raise _unfit(recipe, FileNotFoundError(f"there is no {listing(lacks)}"))
    models = [part for part in _present(index) if (folder / part / CONFIG).is_file()]
    parts = {part: laid_out(str(folder / part)).requires_grad_(False) for part in models}
    return _made(recipe, str(folder), index, **parts)


def load_pipeline(recipe: Recipe) -> Any:
    """Returns the pipeline with its weights, the VAE in float32: in half it is known to overflow.

    Raises:
        UnsupportedHost: It does not load, or lacks weights.
    """
    folder, _ = configs_of(recipe)
    index = read_json(folder / INDEX, DEFAULT_LIMITS)
    where = {} if recipe.revision is None else {"revision": recipe.revision}
    dtype = getattr(torch, str(recipe.dtype))
    parts = {
        name: _of_transformers(recipe, name, index[name][1], dtype=dtype, **where)
        for name in _present(index)
        if index[name][0] == "transformers" and (folder / name / CONFIG).is_file()
    }
    types = {"default": dtype, "vae": torch.float32}
    pipe = _made(recipe, str(recipe.model), index, dtype=types, **parts, **where)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            # diffusers leaves on the meta device what a file lacks
            _check_whole(recipe, name, [n for n, p in part.named_parameters() if p.is_meta])
    return pipe


def _of_transformers(recipe: Recipe, name: str, kind: str, **arguments: Any) -> nn.Module:
    """Loads a text encoder; by itself, since transformers draws by chance what a file lacks."""
    try:
        part, info = getattr(transformers, kind).from_pretrained(
            str(recipe.model), subfolder=name, output_loading_info=True, **arguments
        )
    except Exception as error:  # files that are missing, damaged or of another model
        raise _unfit(recipe, error) from None
    _check_whole(recipe, name, sorted(info["missing_keys"]))
    return part  # type: ignore[no-any-return]


def _check_whole(recipe: Recipe, part: str, missing: list[str]) -> None:
    if missing:
        raise UnsupportedHost(
            f"{recipe.model!r} is not whole: {part} has no weights for {listing(missing)}",
            fix="Download or save it again.",
            field="model",
        )


def _present(index: dict[str, Any]) -> list[str]:
    """Returns the components that a pipeline has, of those that a run needs."""
    return [
        name
        for name, entry in index.items()
        if isinstance(entry, list)
        and None not in entry
        and name not in _IDLE
        and not name.startswith("_")
    ]


def _made(recipe: Recipe, name: str, index: dict[str, Any], **arguments: Any) -> Any:
    import diffusers

    pipeline: Any = diffusers.DiffusionPipeline
    idle = dict.fromkeys(part for part in _IDLE if part in index)
    try:
        pipe = pipeline.from_pretrained(name, **idle, **arguments)
    except LoraError:
        raise
    except Exception as error:  # files that are missing, damaged or of another pipeline
        raise _unfit(recipe, error) from None
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe


def _unfit(recipe: Recipe, error: Exception) -> UnsupportedHost:
    return UnsupportedHost(
        f"{recipe.model!r} does not load: {first_line(error)}",
        fix="Give a folder that pipe.save_pretrained wrote, or a repository id.",
        field="model",
    )


def module_of(recipe: Recipe, pipe: Any) -> DiffusionTrainingModule:
    """Returns a pipeline as the model that is trained.

    Raises:
        UnsupportedHost: No training of this kind of pipeline is known.
        InvalidOption: An option does nothing with it.
    """
    return DiffusionTrainingModule(
        pipe,
        prediction=recipe.prediction,
        min_snr_gamma=recipe.min_snr_gamma,
        noise_offset=recipe.noise_offset or 0.0,
        sampling=recipe.sampling,
        weighting=recipe.weighting or "none",
        caption_dropout=recipe.caption_dropout or 0.0,
        gradient_checkpointing=recipe.gradient_checkpointing,
        seed=recipe.seed % 2**31,
    )


def resolution_of(module: DiffusionTrainingModule) -> int:
    """Returns what the base was made for, pixels a side."""
    pipe, inputs = module.pipe, module.inputs
    places = getattr(pipe, "default_sample_size", None) or inputs.denoiser.config.sample_size
    places = max(places) if isinstance(places, list | tuple) else places
    return int(places) * inputs.factor
