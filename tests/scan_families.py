"""Which default targets every language-model type of transformers gets, on the meta device.

    python tests/scan_families.py [--auto CausalLM,MaskedLM] [--types mamba,t5] [--json OUT]

Builds each type of the auto classes, by default those of language models, from its default config
without weights (about 30 seconds on one core) and prints one line a type: default targets by role,
then what is worth a look: linears inside blocks without a role, linears that the tensor-parallel
plan names and we do not know, fused 3-D expert parameters, subclasses of nn.Linear. Exits with 1
when a type has no default target, so that a rename upstream does not pass unseen.
"""

import argparse
import json
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from hf_lora.families import family_of, frozen_in, role_in, tower_in
from hf_lora.roles import NEVER, expand

SECONDS = 60  # for one type
AUTO = {
    "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "MaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "Seq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "ImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "SpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
# Default configs that cannot build their own model (transformers 5.23.0).
QWEN4_EXP = {
    "ple_layer_ids": [1],
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "eos_token_id": 1,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
GEMMA4_TEXT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
}
OVERRIDES = {  # by model type or class
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "CohereCompassForCausalLM": {
        "num_hidden_layers": 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4}},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "EsmForMaskedLM": {"vocab_size": 33},
    "Gemma4AssistantForCausalLM": {"text_config": {"model_type": "gemma4_text", **GEMMA4_TEXT}},
    "Gemma4UnifiedAssistantForCausalLM": {
        "text_config": {"model_type": "gemma4_unified_text", **GEMMA4_TEXT}
    },
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "MinistralForCausalLM": {"head_dim": 128},
    "NemotronForCausalLM": {"num_key_value_heads": 48},
    "Qwen4ExpForCausalLM": QWEN4_EXP,
    "ReformerModelWithLMHead": {"is_decoder": True},
    "ReformerForMaskedLM": {"is_decoder": False},
}
# No linear layer inside a block: convolutions (squeezebert), integer layers (ibert).
NOTHING_TO_TARGET = {"ibert", "squeezebert"}
DEFAULT = set(expand("default") or ())


def build(model_type, class_names):
    """Builds on the meta device; a composite config that fails is tried as its text part."""
    name = class_names if isinstance(class_names, str) else class_names[0]
    overrides = OVERRIDES.get(model_type, OVERRIDES.get(name, {}))
    config = CONFIG_MAPPING[model_type](**overrides)
    parts = (getattr(config, part, None) for part in ("text_config", "decoder"))
    text = next(filter(None, parts), None)
    make = getattr(transformers, name)
    with torch.device("meta"):
        try:
            return make(config)
        except (AttributeError, ValueError) as first:
            try:
                return make(text)
            except Exception:
                raise first from None


def linears(model):
    """Linears inside repeated blocks: a segment of the path is a number."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"(^|\.)\d+(\.|$)", path):
            yield path, module


def generic(path):
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def planned(model):
    """Yields the names of linears in the tensor-parallel plan, as patterns with `*`."""
    config = model.config.get_text_config()
    plan = {**(getattr(config, "base_model_tp_plan", None) or {})}
    return [re.compile(".*" + re.escape(name).replace(r"\*", r"\d+") + "$") for name in plan]


def read(model):
    """Reads one model into plain data: what is targeted, what is not and why, what is odd."""
    family = family_of(model)
    targets, excused, unknown, odd, plan_gap = Counter(), Counter(), set(), set(), set()
    plan = planned(model)
    for path, module in linears(model):
        role, tower = role_in(path, family), tower_in(path, family)
        if type(module) not in (nn.Linear, Conv1D):
            odd.add(f"{type(module).__name__} {generic(path)}")
        if role is None:
            unknown.add(generic(path))
            if any(pattern.match(path) for pattern in plan):
                plan_gap.add(generic(path))
        elif role in NEVER:
            excused[role] += 1
        elif frozen_in(path, family):
            excused[f"{role} (family {family.name})"] += 1
        elif tower != "language":
            excused[f"{tower} tower"] += 1
        elif role in DEFAULT:
            targets[role] += 1
        else:
            excused[role] += 1
    fused = {
        f"{role_in(name, family)} {generic(name)}"
        for name, value in model.named_parameters()
        if value.ndim == 3 and "conv" not in name
    }
    return {
        "class": type(model).__name__,
        "family": family.name if family else None,
        "targets": dict(sorted(targets.items())),
        "excused": dict(sorted(excused.items())),
        "unknown": sorted(unknown),
        "plan_gap": sorted(plan_gap),
        "fused": sorted(fused),
        "odd": sorted(odd),
    }


def timed_out(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def scan(autos, only):
    """Yields (auto class, model type, reading); a failed build reads as {"error": ...}."""
    signal.signal(signal.SIGALRM, timed_out)
    for auto in autos:
        for model_type, class_names in AUTO[auto].items():
            if only and model_type not in only:
                continue
            signal.alarm(SECONDS)
            try:
                reading = read(build(model_type, class_names))
            except Exception as error:  # any failure of a default config is a finding, not ours
                reading = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
            finally:
                signal.alarm(0)
            yield auto, model_type, reading


def line(auto, model_type, reading):
    if "error" in reading:
        return f"{auto} {model_type}: not built: {reading['error']}"
    roles = " ".join(f"{role}={count}" for role, count in reading["targets"].items())
    notes = [
        f"\n    {key}: {', '.join(reading[key])}"
        for key in ("unknown", "plan_gap", "fused", "odd")
        if reading[key]
    ]
    return f"{auto} {model_type}: {roles or 'NO DEFAULT TARGETS'}{''.join(notes)}"


def main():
    """Scans, prints, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--auto", default="CausalLM,MaskedLM,Seq2SeqLM", help=", ".join(AUTO))
    parser.add_argument("--types", default="", help="comma list of model types; all when empty")
    parser.add_argument("--json", type=Path, help="also write the readings to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    readings, without = {}, []
    only = set(filter(None, options.types.split(",")))
    for auto, model_type, reading in scan(options.auto.split(","), only):
        readings[f"{auto}:{model_type}"] = reading
        sys.stdout.write(line(auto, model_type, reading) + "\n")
        if not reading.get("targets", True) and model_type not in NOTHING_TO_TARGET:
            without.append(model_type)
    built = [reading for reading in readings.values() if "error" not in reading]
    sys.stdout.write(
        f"{len(readings)} types, {len(built)} built, {sum(bool(r['targets']) for r in built)} with "
        f"default targets, {sum(not r['unknown'] for r in built)} with a role for every linear, "
        f"{sum(bool(r['plan_gap']) for r in built)} with a gap against the tensor-parallel plan\n"
    )
    if options.json:
        options.json.write_text(json.dumps(readings, indent=1, sort_keys=True) + "\n")
    return int(bool(without))


if __name__ == "__main__":
    sys.exit(main())
