"""Runs of pipelines: pictures with captions, as VAE and text encoders see them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset, Subset

from hf_lora.attach import attach_lora
from hf_lora.errors import BadDataset, InvalidOption, shown
from hf_lora.formats.diffusers import WEIGHTS
from hf_lora.hosts import model_of, parts_of
from hf_lora.manifest import Manifest
from hf_lora.plan import LoraPlan, plan_lora
from hf_lora.record import keep_record, record_of
from hf_lora.training.callback import LoraCallback
from hf_lora.training.data import MOST_HELD_OUT
from hf_lora.training.diffusion import (
    DiffusionTrainingModule,
    PictureRows,
    cache_rows,
    open_cache,
    picture_rows,
)
from hf_lora.training.diffusion.cache import INDEX, identity
from hf_lora.training.diffusion.pictures import UncachedRows
from hf_lora.training.optimizers import lora_optimizer
from hf_lora.training.recipe.estimate import Memory, estimate_pictures
from hf_lora.training.recipe.kit import Loaded, adapter_arguments, run_line
from hf_lora.training.recipe.loop import arguments
from hf_lora.training.recipe.pipelines import (
    configs_of,
    laid_out_pipeline,
    load_pipeline,
    module_of,
    resolution_of,
)
from hf_lora.training.recipe.presets import (
    CACHES,
    after_rows,
    before_pictures,
    device_type,
    processes,
    steps_of,
)
from hf_lora.training.recipe.table import Recipe
from hf_lora.training.trainer import LoraTrainer

_FEW_STEPS = 200  # below which a style is hardly learnt at the default rate
_DRAWN_SIDE = 8  # pixels, of which all pipelines draw multiples
_CACHED_PIXELS = 4 * 512 * 512  # that the VAE reads at once


@dataclass(frozen=True)
class PictureRun:
    """A run of a pipeline before its weights are loaded, see `kit.Run`.

    Attributes:
        recipe: Resolved: nothing is left to decide.
        sketch: The pipeline with the adapter, on the meta device.
        plan: What the adapter sits on.
        rows: All pictures.
        train: Places in `rows` to learn from.
        held_out: Places in `rows` to be judged by.
        steps: Optimizer steps.
        notes: What a reader should know.
    """

    recipe: Recipe
    sketch: DiffusionTrainingModule
    plan: LoraPlan
    rows: PictureRows
    train: Sequence[int]
    held_out: Sequence[int]
    steps: int
    notes: tuple[str, ...]

    weights = WEIGHTS

    def counts(self) -> dict[str, Any]:
        """Returns how much there is to learn, as plain data."""
        return {
            "task": "pictures",
            "rows": len(self.rows),
            "train_sequences": len(self.train),
            "held_out_sequences": len(self.held_out),
            "resolution": self.recipe.resolution,
            "steps": self.steps,
        }

    def counted(self) -> list[str]:
        """Returns how much there is to learn, as lines to show."""
        side = self.recipe.resolution
        return [
            f"Task pictures: {len(self.train)} to learn from, {len(self.held_out)} held out, "
            f"{side} x {side} pixels",
            *(f"  note: {note}" for note in self.notes),
            run_line(self.recipe, self.steps, "pictures"),
        ]

    def weigh(self) -> tuple[LoraPlan, Memory]:
        """Returns plan and memory of the run, from shapes alone."""
        recipe = self.recipe
        memory = estimate_pictures(
            self.sketch,
            rows=recipe.batch_size,
            resolution=int(recipe.resolution or 0),
            dtype=getattr(torch, str(recipe.dtype)),
            optimizer=recipe.optimizer,
            device=device_type(),
        )
        return self.plan, memory

    def load(self) -> Loaded:
        """Loads the pipeline and attaches the adapter that the recipe describes."""
        recipe = self.recipe
        pipe = load_pipeline(recipe)
        transformers.set_seed(recipe.seed)
        plan = plan_lora(pipe, **adapter_arguments(recipe))
        attach_lora(pipe, **adapter_arguments(recipe))
        manifest = Manifest(
            training={"task": "pictures", "resolution": recipe.resolution},
            trigger_words=(recipe.trigger,) if recipe.trigger else (),
        )
        for part in map(model_of, parts_of(pipe).values()):
            record = record_of(part)
            record.manifests[plan.name] = manifest
            keep_record(part, record)
        return Loaded(module_of(recipe, pipe), plan)

    def trainer(self, loaded: Loaded, out: Path) -> LoraTrainer:
        """Returns the trainer of a loaded pipeline; VAE and text encoders have read all pictures.

        Raises:
            BadDataset: The VAE makes something of a picture that is not finite.
        """
        recipe, module = self.recipe, loaded.model
        told = arguments(recipe, out, self.steps)
        module.to(told.device)
        rows = self._encoded(module)
        kind: Any = recipe.optimizer
        rate = float(recipe.lr or 0)
        optimizer = lora_optimizer(module, kind, lr=rate, weight_decay=recipe.weight_decay)
        return LoraTrainer(
            model=module,
            args=told,
            train_dataset=Subset(rows, self.train),
            eval_dataset=Subset(rows, self.held_out) if recipe.eval_every else None,
            optimizers=(optimizer, None),
            callbacks=[LoraCallback(samples=self._samples())],
        )

    def _samples(self) -> list[dict[str, Any]]:
        """Returns the prompts to draw, as large as the pictures where pipelines can."""
        side = int(self.recipe.resolution or 0)
        size = {} if side % _DRAWN_SIDE else {"height": side, "width": side}
        return [{"prompt": prompt, **size} for prompt in self.recipe.samples or ()]

    def _encoded(self, module: DiffusionTrainingModule) -> Dataset[dict[str, Tensor]]:
        """Returns the rows as the module takes them, from a cache if the recipe says so."""
        recipe = self.recipe
        if recipe.cache == "none":
            return UncachedRows(module, self.rows)
        folder = None if recipe.cache in CACHES else self._folder(module, str(recipe.cache))
        if folder is not None and (folder / INDEX).is_file():
            return open_cache(folder, module)
        at_once = max(1, min(8, _CACHED_PIXELS // int(recipe.resolution or 1) ** 2))
        module.eval()
        return cache_rows(module, self.rows, folder=folder, batch_size=at_once)

    def _folder(self, module: DiffusionTrainingModule, cache: str) -> Path:
        """Returns the folder for these pictures and this base: others lie beside it."""
        text = not any(module.inputs.adapted(name) for name in module.inputs.kind.encoders)
        pictures = _digest(self.rows, range(len(self.rows)), ())
        return Path(cache) / f"{pictures[:16]}-{identity(module, text=text)[:16]}"

    def finish(self, out: Path) -> None:
        """The adapter needs nothing beside it."""


def prepare_pictures(recipe: Recipe) -> PictureRun:
    """Reads configs, pictures and captions, and decides everything that is still open.

    Raises:
        LoraError: One of its subclasses, for whatever cannot be used; nothing has been changed.
    """
    folder, commit = configs_of(recipe)
    pipe = laid_out_pipeline(recipe, folder)
    recipe = before_pictures(recipe, commit, resolution_of(module_of(recipe, pipe)))
    plan = plan_lora(pipe, **adapter_arguments(recipe))
    attach_lora(pipe, **adapter_arguments(recipe))
    module = module_of(recipe, pipe)
    _check_resolution(module, int(recipe.resolution or 0))
    _check_samples(module, recipe.samples or ())
    rows, held = _read(recipe, module)
    judging = set(held)
    train = [place for place in range(len(rows)) if place not in judging]
    if not train:
        raise BadDataset(f"all {len(rows)} pictures would be held out", fix="Give more pictures.")
    recipe = after_rows(recipe, _digest(rows, train, held), len(train), judged=bool(held))
    steps = steps_of(recipe, len(train), processes())
    notes = (*rows.notes, *_notes(rows, train, held, steps))
    return PictureRun(recipe, module, plan, rows, train, held, steps, notes)


def _check_resolution(module: DiffusionTrainingModule, side: int) -> None:
    step = module.inputs.factor * module.inputs.kind.multiple
    if side % step:
        raise InvalidOption(
            f"--resolution {side} is no multiple of {step}, as VAE and denoiser need it",
            fix=f"Use --resolution {max(1, round(side / step)) * step}.",
            field="resolution",
        )


def _check_samples(module: DiffusionTrainingModule, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        try:
            module.tokenize([prompt])
        except BadDataset as error:
            raise InvalidOption(
                f"--samples {shown(prompt)}: {error.fact}", fix=error.fix, field="samples"
            ) from None


def _read(recipe: Recipe, module: DiffusionTrainingModule) -> tuple[PictureRows, list[int]]:
    """Returns all pictures, and the places of those to be judged by."""

    def read(paths: Sequence[str]) -> PictureRows:
        return picture_rows(
            paths,
            resolution=int(recipe.resolution or 0),
            trigger=recipe.trigger,
            check_caption=lambda caption: module.tokenize([caption]),
        )

    rows = read(recipe.data)
    if not recipe.eval_data:
        return rows, _drawn(len(rows), recipe.held_out or 0.0, recipe.seed)
    judged = read(recipe.eval_data)
    both = PictureRows([*rows.pictures, *judged.pictures], rows.resolution)
    both.digests = [*rows.digests, *judged.digests]
    both.notes = list(dict.fromkeys([*rows.notes, *judged.notes]))
    return both, list(range(len(rows), len(both)))


def _drawn(rows: int, share: float, seed: int) -> list[int]:
    """Returns which pictures are held out: the same for the same number, share and seed."""
    if not share or rows < 2:
        return []
    wanted = min(MOST_HELD_OUT, max(1, round(share * rows)))
    return sorted(random.Random(seed).sample(range(rows), wanted))


def _digest(rows: PictureRows, train: Sequence[int], held: Sequence[int]) -> str:
    """Returns the SHA-256 of pictures and captions in two sets, in their order."""
    told = "|".join(",".join(rows.digests[place] for place in part) for part in (train, held))
    return hashlib.sha256(told.encode()).hexdigest()


def _notes(
    rows: PictureRows, train: Sequence[int], held: Sequence[int], steps: int
) -> Sequence[str]:
    notes = []
    if not held:
        notes.append("no pictures are held out: nothing says whether they are learnt by heart")
    learnt = {rows.digests[place] for place in train}
    twice = sum(rows.digests[place] in learnt for place in held)
    if twice:
        notes.append(f"{twice} of {len(held)} held-out pictures are also learnt from")
    if steps < _FEW_STEPS:
        notes.append(
            f"{steps} steps are few: styles take several hundred to 2,000, --epochs or --max-steps"
        )
    return notes
