"""What an adapter is for: the Hub's name of the task, and the class that loads its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from hf_lora.adapter import MODEL, Adapter
from hf_lora.facts import BASES

__all__ = ["Task", "task_for"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        tag: `pipeline_tag` of the Hub; empty when unknown.
        loader: Class of transformers or diffusers whose `from_pretrained` loads the base; empty
            when unknown.
        call: What a pipeline of diffusers is called with, and what of its answer is looked at, with
            `{prompt}` in the place of the prompt.
        needs: Functions of `diffusers.utils` in that call.
        library: Where a single model comes from.
        folder: Where it lies in the repository of its pipeline.
    """

    tag: str
    loader: str = ""
    call: str = ""
    needs: tuple[str, ...] = ()
    library: str = "transformers"
    folder: str = ""


# Table of classes in transformers' `modeling_auto` -> task. The first that holds the class decides,
# so a class of two kinds stands under the more special one (Gemma 3 writes text about pictures; an
# encoder-decoder fills masks as well). The Hub has made `text2text-generation` a part of
# `text-generation` (huggingface.js #1590).
_TABLES: Mapping[str, Task] = {
    "SEQUENCE_CLASSIFICATION": Task("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLASSIFICATION": Task("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANSWERING": Task("question-answering", "AutoModelForQuestionAnswering"),
    "MULTIPLE_CHOICE": Task("multiple-choice", "AutoModelForMultipleChoice"),
    "DOCUMENT_QUESTION_ANSWERING": Task(
        "document-question-answering", "AutoModelForDocumentQuestionAnswering"
    ),
    "IMAGE_CLASSIFICATION": Task("image-classification", "AutoModelForImageClassification"),
    "VIDEO_CLASSIFICATION": Task("video-classification", "AutoModelForVideoClassification"),
    "SEMANTIC_SEGMENTATION": Task("image-segmentation", "AutoModelForSemanticSegmentation"),
    "UNIVERSAL_SEGMENTATION": Task("image-segmentation", "AutoModelForUniversalSegmentation"),
    "OBJECT_DETECTION": Task("object-detection", "AutoModelForObjectDetection"),
    "ZERO_SHOT_OBJECT_DETECTION": Task(
        "zero-shot-object-detection", "AutoModelForZeroShotObjectDetection"
    ),
    "DEPTH_ESTIMATION": Task("depth-estimation", "AutoModelForDepthEstimation"),
    "AUDIO_CLASSIFICATION": Task("audio-classification", "AutoModelForAudioClassification"),
    "CTC": Task("automatic-speech-recognition", "AutoModelForCTC"),
    "SPEECH_SEQ_2_SEQ": Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
    "IMAGE_TEXT_TO_TEXT": Task("image-text-to-text", "AutoModelForImageTextToText"),
    "VISUAL_QUESTION_ANSWERING": Task(
        "visual-question-answering", "AutoModelForVisualQuestionAnswering"
    ),
    "SEQ_TO_SEQ_CAUSAL_LM": Task("text-generation", "AutoModelForSeq2SeqLM"),
    "CAUSAL_LM": Task("text-generation", "AutoModelForCausalLM"),
    "MASKED_LM": Task("fill-mask", "AutoModelForMaskedLM"),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": Task(
        "zero-shot-image-classification", "AutoModelForZeroShotImageClassification"
    ),
    "IMAGE": Task("image-feature-extraction", "AutoModel"),
    "TEXT_ENCODING": Task("feature-extraction", "AutoModel"),
}
_TRUNK = Task("feature-extraction", "AutoModel")

# `task_type` of peft -> table, for files that name no class.
_TYPES = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "FEATURE_EXTRACTION": "TEXT_ENCODING",
}

# Denoisers that are adapted alone, by the names of diffusers -> their folder.
_DENOISERS = ((r"UNet\w*Model", "unet"), (r"\w+Transformer[23]DModel", "transformer"))

_PIPE = "DiffusionPipeline"  # makes the pipeline that the base's repository names
_PICTURE = "image = pipe({prompt}).images[0]"
_FRAMES = "frames = pipe({prompt}).frames[0]"
_FROM_PICTURE = 'image = pipe({prompt}, image=load_image("input.png")).images[0]'
_MASKED = (
    'image = pipe({prompt}, image=load_image("input.png"), mask_image=load_image("mask.png"))'
    ".images[0]"
)
_MOVED = 'frames = pipe(image=load_image("input.png"), prompt={prompt}).frames[0]'
_CHANGED = 'frames = pipe(video=load_video("input.mp4"), prompt={prompt}).frames[0]'

# What the name of a pipeline's class holds -> task; the first that fits. Where no class is known,
# the same words are looked for in the name of the base. Names: diffusers 0.42.1.
_PIPELINES: tuple[tuple[str, Task], ...] = (
    (r"inpaint|(^|[a-z_/-])fill", Task("image-to-image", "AutoPipelineForInpainting", _MASKED,
                                       ("load_image",))),
    (r"i2v|image-?(to|2)-?video|stable-?video",
     Task("image-to-video", _PIPE, _MOVED, ("load_image",))),
    (r"v2v|video-?(to|2)-?video", Task("video-to-video", _PIPE, _CHANGED, ("load_video",))),
    (r"text-?to-?image|t2i", Task("text-to-image", _PIPE, _PICTURE)),
    (r"t2v|video|(^|[/_-])(wan|ltx|mochi|animatediff|allegro|latte|skyreels|easyanimate|cosmos)",
     Task("text-to-video", _PIPE, _FRAMES)),
    (r"audio|music", Task("text-to-audio", _PIPE, "audio = pipe({prompt}).audios[0]")),
    (r"(img|depth)2img",
     Task("image-to-image", "AutoPipelineForImage2Image", _FROM_PICTURE, ("load_image",))),
    (r"kontext|edit|pix2pix|i2i|upscale|refiner",
     Task("image-to-image", _PIPE, _FROM_PICTURE, ("load_image",))),
    ("", Task("text-to-image", _PIPE, _PICTURE)),
)  # fmt: skip


def task_for(adapter: Adapter, base: str) -> Task:
    """Returns what an adapter is for; a task without a tag where nothing tells.

    Args:
        adapter: The adapter.
        base: Id of its base, for pipelines whose class is unknown.
    """
    manifest = adapter.manifest
    if MODEL in adapter.components:
        return _of_class(manifest.host) or _of_type(adapter)
    said = [manifest.foreign.get(key, "") for key in BASES]
    words = [manifest.host] if manifest.host else [base, *said]
    return next(
        task
        for pattern, task in _PIPELINES
        if any(re.search(pattern, word, re.IGNORECASE) for word in words)
    )


def _of_class(name: str) -> Task | None:
    if not name:
        return None
    for table, task in _TABLES.items():
        if name in _classes(f"FOR_{table}_"):
            return task
    for pattern, folder in _DENOISERS:
        if re.fullmatch(pattern, name):
            return Task("", name, library="diffusers", folder=folder)
    return _TRUNK if name in _classes("") else None


def _of_type(adapter: Adapter) -> Task:
    kind = adapter.components[MODEL].config.get("task_type")
    table = _TYPES.get(str(getattr(kind, "value", kind)))
    return Task("") if table is None else _TABLES[table]


@cache
def _classes(table: str) -> frozenset[str]:
    """Returns the classes in one of transformers' tables; older versions lack some tables."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for value in getattr(modeling_auto, f"MODEL_{table}MAPPING_NAMES", {}).values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)
