"""What the header of a file says of itself: base, trigger words, tags, and facts of its training.

All of it is the claim of whoever wrote the file. Values stay as they are; whoever shows them cuts
and escapes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from hf_lora.adapter import Adapter
from hf_lora.errors import BadAdapterFile
from hf_lora.formats.container import parse_json
from hf_lora.formats.header import NOTHING, trigger_words
from hf_lora.limits import DEFAULT_LIMITS
from hf_lora.manifest import Manifest

TAGS = "ss_tag_frequency"
MOST = 10  # tags that are worth a look
_LONGEST = 8 << 20  # characters of JSON; parsed it takes some twenty times as much memory

# Header keys that name the base. Sources: sd-scripts `train_network.py`, and the metadata standard
# of Stability AI (`modelspec.*`).
BASES = (
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "modelspec.architecture",
    "modelspec.prediction_type",
)

# What a fact is called -> the header keys that may say it, the first that does.
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("title", ("modelspec.title", "ss_output_name", "name")),
    ("author", ("modelspec.author",)),
    ("license", ("modelspec.license",)),
    ("date", ("modelspec.date", "ss_training_finished_at", "ss_training_started_at")),
    ("description", ("modelspec.description", "ss_training_comment")),
    ("usage hint", ("modelspec.usage_hint",)),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("training images", ("ss_num_train_images",)),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("batch size", ("ss_total_batch_size", "ss_batch_size_per_device")),
    ("learning rate", ("ss_learning_rate",)),
    ("of the denoiser", ("ss_unet_lr",)),
    ("of text encoders", ("ss_text_encoder_lr",)),
    ("optimizer", ("ss_optimizer",)),
    ("schedule", ("ss_lr_scheduler",)),
    ("seed", ("ss_seed",)),
    ("clip skip", ("ss_clip_skip", "modelspec.encoder_layer")),
    ("network module", ("ss_network_module",)),
    ("network dim", ("ss_network_dim",)),
    ("network alpha", ("ss_network_alpha",)),
    ("network args", ("ss_network_args",)),
    ("software", ("software", "modelspec.implementation_version", "modelspec.implementation")),
    ("merged from", ("modelspec.merged_from",)),
)
_DATES = ("ss_training_finished_at", "ss_training_started_at")  # seconds since 1970


@dataclass(frozen=True)
class Said:
    """What a file says of itself.

    Attributes:
        base: Header key, or field of the manifest -> what it says of the base.
        trigger_words: Words that call the style up.
        tags: The most frequent words of the captions it was trained on -> how often; no triggers.
        facts: Name of a fact -> value.
        notes: What could not be read.
    """

    base: Mapping[str, str]
    trigger_words: tuple[str, ...]
    tags: Mapping[str, int]
    facts: Mapping[str, str]
    notes: tuple[str, ...]


def said_by(manifest: Manifest, adapter: Adapter | None) -> Said:
    """Returns what a file says of itself.

    Args:
        manifest: Its manifest, with the foreign keys of the header.
        adapter: What was read of it, for the base that configs of peft name; None where nothing
            could be.
    """
    header = manifest.foreign
    base = {key: header[key] for key in BASES if header.get(key, "") not in NOTHING}
    parts = () if adapter is None else adapter.components.values()
    named = [part.config.get("base_model_name_or_path") for part in parts]
    own = {
        "base": manifest.base.id or next((n for n in named if isinstance(n, str) and n), ""),
        "revision": manifest.base.revision,
        "class": manifest.host,
    }
    facts = {}
    for name, keys in FACTS:
        key = next((key for key in keys if header.get(key, "") not in NOTHING), None)
        if key is not None:
            facts[name] = _date(header[key]) if key in _DATES else header[key]
    tags, notes = _tags(header.get(TAGS, ""))
    return Said(
        base={**{k: v for k, v in own.items() if v}, **base},
        trigger_words=manifest.trigger_words or trigger_words(header),
        tags=tags,
        facts=facts,
        notes=notes,
    )


def _date(seconds: str) -> str:
    """Returns a time in words; what is no number as it stands."""
    try:
        return datetime.fromtimestamp(float(seconds), UTC).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return seconds


def _tags(text: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the most frequent tags over all folders of images, and why they cannot be told."""
    if text in NOTHING:
        return {}, ()
    if len(text) > _LONGEST:
        return {}, (f"{TAGS} has {len(text):,} characters and was not read",)
    try:
        folders = parse_json(text, DEFAULT_LIMITS.depth, TAGS)
    except BadAdapterFile as error:
        return {}, (f"{error.fact}, so that its tags were not read",)
    count: Counter[str] = Counter()
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, times in folder.items() if isinstance(folder, dict) else ():
            if type(times) is int and 0 < times < 1 << 53 and tag.strip():
                count[tag.strip()] += times
    return dict(count.most_common(MOST)), ()
