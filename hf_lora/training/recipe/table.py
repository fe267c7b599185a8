"""What a run is told: one table, each row a flag of `hf-lora train` and a key of its YAML file.

A value left out is None until `presets` puts the default in that the row explains. The resolved
recipe is written beside the adapter, and told again it repeats the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_lora.errors import InvalidOption, shown
from hf_lora.training.recipe.kinds import (
    CLASSES,
    DATE,
    NAMES,
    NUMBER,
    PATHS,
    SWITCH,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
)

Base = Literal["", "language model", "pipeline"]
_LANGUAGE: Base = "language model"
_PIPELINE: Base = "pipeline"


def _row(
    kind: Kind,
    text: str,
    default: str = "",
    *,
    value: Any = None,
    choices: Sequence[str] = (),
    least: float | None = None,
    below: float | None = None,
    shapes: bool = True,
    only: Base = "",
) -> Any:
    """One row of the table.

    Args:
        kind: Of the value.
        text: What it is.
        default: What it is when left out, and why.
        value: The default itself where nothing has to be known for it.
        choices: The values there are.
        least: The smallest number.
        below: What a number stays below.
        shapes: Whether a run with another value is another run, which cannot go on from this one.
        only: The kind of base that it is for; empty for any.
    """
    facts = {"kind": kind, "text": text, "default": default, "choices": choices, "only": only}
    return field(
        default=value, metadata={**facts, "least": least, "below": below, "shapes": shapes}
    )


@dataclass(frozen=True)
class Recipe:
    """Everything a run is told; None stands for what is still to be decided."""

    model: str | None = _row(TEXT, "the base: a folder or repository id")
    revision: str | None = _row(
        TEXT, "branch, tag or commit of the base's repository", "the newest commit, then kept"
    )
    data: tuple[str, ...] = _row(
        PATHS,
        "JSON Lines to learn from: files, or folders of .jsonl files; for a pipeline folders of "
        "pictures with captions",
        value=(),
        shapes=False,  # what was read from them counts: data_digest
    )
    eval_data: tuple[str, ...] = _row(
        PATHS, "rows to be judged by, as --data", "a share of --data", value=(), shapes=False
    )
    held_out: float | None = _row(
        NUMBER,
        "share of --data to hold out when there is no --eval-data",
        "0.05, at most 512 rows: enough to see a loss turn",
        least=0,
        below=1,
    )
    task: str | None = _row(
        TEXT,
        "what the rows are",
        "that of the first row",
        choices=("chat", "text", "label"),
        only=_LANGUAGE,
    )
    labels: tuple[str, ...] | None = _row(
        CLASSES,
        "the classes, in the order of their numbers",
        "those of the data, sorted",
        only=_LANGUAGE,
    )
    chat_template: str | None = _row(
        TEXT,
        "chatml, plain, or a Jinja file",
        "the tokenizer's own, which the base learnt",
        only=_LANGUAGE,
    )
    today: str | None = _row(
        DATE,
        "the date in chat templates that show one, as 2026-01-31",
        "the day of the run",
        only=_LANGUAGE,
    )
    max_length: int | None = _row(
        WHOLE,
        "tokens after which a sequence is cut",
        "1024, or what the base can take: longer costs memory that most rows do not need",
        least=2,
        only=_LANGUAGE,
    )
    packing: bool = _row(
        SWITCH, "fill each sequence of a batch with several rows, which do not see each other",
        "no: a batch then holds more rows than asked for, which changes the best rate",
        value=False, only=_LANGUAGE,
    )  # fmt: skip
    group_by_length: bool = _row(
        SWITCH,
        "batch rows of like length",
        "no: order by chance alone",
        value=False,
        only=_LANGUAGE,
    )
    resolution: int | None = _row(
        WHOLE,
        "pixels a side: pictures are resized by the shorter one and cropped in the middle",
        "what the base was made for",
        least=8,
        only=_PIPELINE,
    )
    components: tuple[str, ...] | None = _row(
        NAMES,
        "parts of the pipeline that learn, such as unet,text_encoder",
        "the denoiser",
        only=_PIPELINE,
    )
    trigger: str | None = _row(
        TEXT,
        "word to call the style up with: put before each caption, and kept in the file",
        "none",
        only=_PIPELINE,
    )
    prediction: str | None = _row(
        TEXT,
        "what the denoiser predicts",
        "as the base's scheduler says",
        choices=("epsilon", "v_prediction", "flow"),
        only=_PIPELINE,
    )
    min_snr_gamma: float | None = _row(
        NUMBER,
        "gamma of min-SNR weights, 5 in the paper (arXiv 2303.09556); UNets",
        "no weights",
        least=1e-3,
        only=_PIPELINE,
    )
    noise_offset: float | None = _row(
        NUMBER, "how much of one random value a channel is added to the noise; UNets", "none",
        least=0, only=_PIPELINE,
    )  # fmt: skip
    sampling: str | None = _row(
        TEXT,
        "where on the way to noise; flow matching",
        "as the scripts of diffusers: uniform for Flux, logit_normal for SD3",
        choices=("uniform", "logit_normal", "mode"),
        only=_PIPELINE,
    )
    weighting: str | None = _row(
        TEXT,
        "what the error at each place counts; flow matching",
        "none",
        choices=("none", "sigma_sqrt", "cosmap", "preconditioned"),
        only=_PIPELINE,
    )
    caption_dropout: float | None = _row(
        NUMBER, "share of the pictures that are learnt without their caption", "none",
        least=0, below=1, only=_PIPELINE,
    )  # fmt: skip
    cache: str | None = _row(
        TEXT,
        "where pictures and captions lie as VAE and text encoders see them: memory, none, or a "
        "folder that later runs on the same pictures read again",
        "memory: a step then runs the denoiser alone",
        shapes=False,
        only=_PIPELINE,
    )
    samples: tuple[str, ...] | None = _row(
        TEXTS,
        "prompts to draw at each evaluation, from the same noise",
        "none",
        shapes=False,
        only=_PIPELINE,
    )
    variant: str = _row(
        TEXT,
        "lora, dora or rslora",
        "lora: at a tuned rate, variants are reported within 1-2 percent (arXiv 2602.04998)",
        value="lora",
        choices=("lora", "dora", "rslora"),
    )
    targets: tuple[str, ...] = _row(
        NAMES,
        "preset, or roles and names",
        "default, all linear layers of the blocks: attention alone learns less at equal size; of a "
        "denoiser its attention",
        value=("default",),
    )
    rank: int = _row(
        WHOLE,
        "rank of the factors",
        "16, for small data; take 64 and more for hundreds of millions of tokens",
        value=16,
        least=1,
    )
    alpha: float | None = _row(
        NUMBER,
        "the update is scaled by alpha/rank (rslora: alpha/sqrt rank)",
        "32 at every rank, which keeps the best rate independent of it; 8 for rslora, the same "
        "strength at rank 16. Pipelines: the rank (rslora: its root), strength 1 as everywhere",
    )
    dropout: float | None = _row(
        NUMBER,
        "dropout on the input of A",
        "0 for one epoch, 0.05 for more: rows that come twice are learnt by heart; 0 for pipelines",
        least=0,
        below=1,
    )
    load_in: str | None = _row(
        TEXT,
        "quantise the base while loading: 4bit (NF4, double) or 8bit",
        "no: it saves memory, not time",
        choices=("4bit", "8bit"),
        only=_LANGUAGE,
    )
    dtype: str | None = _row(
        TEXT,
        "dtype of the base and of the products",
        "bfloat16 on a GPU that has it (else float16), float32 on a CPU, which has no faster one",
        choices=("float32", "bfloat16", "float16"),
    )
    optimizer: str = _row(
        TEXT,
        "adamw, lora+ (B learns 16 times faster) or lora-fa (A frozen: less memory)",
        "adamw, which every published rate is for",
        value="adamw",
        choices=("adamw", "lora+", "lora-fa"),
    )
    lr: float | None = _row(
        NUMBER,
        "learning rate",
        "ten times that of full fine-tuning, by width: 5e-4 * (2000/width)^p, p = 0.781 for Llama "
        "and 0.0775 for Qwen (fitted by tinker-cookbook), at most 2e-3; other models 2e-4; "
        "pipelines 1e-4, as the scripts of diffusers",
        least=1e-9,
    )
    schedule: str = _row(
        TEXT,
        "how the rate falls",
        "linear, to zero at the end",
        value="linear",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = _row(
        NUMBER,
        "share of the steps in which the rate rises",
        "0.03: Adam's averages are empty at first",
        value=0.03,
        least=0,
        below=1,
    )
    weight_decay: float = _row(
        NUMBER, "decay of the factors", "0: they start at or near zero", value=0.0, least=0
    )
    epochs: float | None = _row(
        NUMBER, "times that each row is seen", "1; see the held-out loss before you take more",
        least=1e-3,
    )  # fmt: skip
    max_steps: int | None = _row(WHOLE, "steps, instead of --epochs", "by --epochs", least=1)
    batch_size: int = _row(
        WHOLE,
        "sequences a step computes at once, on each process",
        "8: LoRA is reported to learn less from large batches, above 32",
        value=8,
        least=1,
    )
    accumulate: int = _row(WHOLE, "batches a step adds up, to save memory", "1", value=1, least=1)
    gradient_checkpointing: bool = _row(
        SWITCH,
        "compute activations twice instead of keeping them: a third slower, much less memory",
        "no; the dry run says whether it is needed",
        value=False,
    )
    seed: int = _row(
        WHOLE, "seed of the split, the order, the first factors and dropout", "0", value=0,
        least=0, below=2**32,
    )  # fmt: skip
    eval_every: int | None = _row(WHOLE, "steps between evaluations", "a fifth of the run", least=1)
    save_every: int | None = _row(
        WHOLE, "steps between checkpoints", "a fifth of the run, at most 500", least=1, shapes=False
    )
    keep: int = _row(
        WHOLE, "checkpoints to keep", "2, so that one is whole while one is written", value=2,
        least=1, shapes=False,
    )  # fmt: skip
    data_digest: str | None = _row(
        TEXT, "SHA-256 of the tokens: refuse when the data gives others", "not checked"
    )
    out: str | None = _row(TEXT, "folder to write, new or empty", shapes=False)
    resume: bool = _row(
        SWITCH, "go on from the newest complete checkpoint in --out", "no", value=False,
        shapes=False,
    )  # fmt: skip
    dry_run: bool = _row(
        SWITCH, "say what would be done; load no weights, write nothing", "no", value=False,
        shapes=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for row in FIELDS.values():
            _check(row, getattr(self, row.name))

    def to_dict(self) -> dict[str, Any]:
        """Returns the rows as plain data, in the table's order."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


FIELDS: Mapping[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Recipe)}


def flag_of(name: str) -> str:
    """Returns the flag of a row."""
    return "--" + name.replace("_", "-")


def _check(row: dataclasses.Field[Any], value: Any) -> None:
    """Raises InvalidOption where a value is none that the row allows."""
    facts = row.metadata
    if value is None or value == row.default:
        return
    wrong = ""
    if facts["choices"] and value not in facts["choices"]:
        wrong = f"is none of {', '.join(facts['choices'])}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            wrong = "is not finite"
        elif facts["least"] is not None and value < facts["least"]:
            wrong = f"is less than {facts['least']}"
        elif facts["below"] is not None and value >= facts["below"]:
            wrong = f"is not below {facts['below']}"
    if wrong:
        raise InvalidOption(f"{flag_of(row.name)} {shown(value)} {wrong}", field=row.name)
