"""Load a Flux-shaped LoRA of 500 targets with hf_lora and with plain diffusers, interleaved.

The pipeline has Flux's 19 double and 38 single blocks, narrowed to 4 heads of 64 and with random
weights; the adapter has rank 16 on 494 linears, alpha unlike rank. It is loaded from a file that
diffusers wrote and from one in kohya's spelling, whose fused layers are split (diffusers' own
converter takes that at Flux's full width only, so both stand beside its load of the first file).
hf_lora checks all it reads. Then ten adapters are loaded one beside the other. Prints CPU seconds
and their ratios, medians of `--rounds`; takes about two minutes.

    python benchmarks/diffusion_load.py [--rounds 5]
"""

import argparse
import gc
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import diffusers
import peft
import torch

from hf_lora import attach_lora, detach_lora, load_lora, open_adapter, save_adapter

ADAPTERS = 10
SIZES = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 28, 28),
    "in_channels": 16,
}
# all linears of the blocks, modulations included
TARGETS = (
    r".*blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm\.linear|norm1\.linear"
    r"|norm1_context\.linear|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


def pipeline():
    """Returns a Flux pipeline that has a denoiser and nothing else."""
    torch.manual_seed(0)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.FluxTransformer2DModel(**SIZES).eval(),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )


def write_files(folder):
    """Writes one adapter as diffusers and as kohya do; returns both paths and its targets."""
    pipe = pipeline()
    config = peft.LoraConfig(r=16, lora_alpha=8, target_modules=TARGETS)
    pipe.transformer.add_adapter(config)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs = folder / "diffusers.safetensors"
    state = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=metadata,
        weight_name=theirs.name,
    )
    adapter = open_adapter(theirs)
    kohya = save_adapter(adapter, folder / "kohya.safetensors", layout="kohya", host=pipe)
    return theirs, kohya, len(adapter.components["transformer"].targets)


def cpu(action):
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def one(pipe, theirs, kohya, rounds, times):
    """Measures one adapter on a bare pipeline."""

    def load():
        pipe.load_lora_weights(theirs.parent, weight_name=theirs.name)

    for round_ in range(rounds + 1):
        row = {}
        for file in (theirs, kohya):
            row[file.stem, "hf_lora"] = cpu(lambda file=file: load_lora(pipe, file))
            detach_lora(pipe.transformer)
        row["diffusers", "diffusers"] = cpu(load)
        pipe.unload_lora_weights()
        for key, seconds in row.items() if round_ else ():  # the first one warms up
            times[key].append(seconds)


def ten(pipe, file, rounds, times):
    """Measures ten adapters, each beside the ones before."""

    def load(name):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)

    for _ in range(rounds):
        for number in range(ADAPTERS):
            seconds = cpu(lambda name=f"a{number}": load_lora(pipe, file, name=name))
            times["ten", "hf_lora", number].append(seconds)
        detach_lora(pipe.transformer)
        for number in range(ADAPTERS):
            times["ten", "diffusers", number].append(cpu(lambda name=f"a{number}": load(name)))
        pipe.unload_lora_weights()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    measured = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        theirs, kohya, targets = write_files(Path(folder))
        pipe = pipeline()
        one(pipe, theirs, kohya, args.rounds, measured)
        ten(pipe, theirs, max(1, args.rounds // 2), measured)
        attach_lora(pipe.transformer)  # still whole after all that
    times = {key: statistics.median(values) for key, values in measured.items()}
    print(
        f"{platform.machine()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, peft {peft.__version__}, diffusers {diffusers.__version__}; "
        f"{targets} targets; median CPU seconds of {args.rounds}"
    )
    print("| what | hf_lora | diffusers | ratio |\n| --- | --- | --- | --- |")
    peer = times["diffusers", "diffusers"]
    for file in ("diffusers", "kohya"):
        ours = times[file, "hf_lora"]
        print(f"| load, {file}'s file | {ours:.3f} | {peer:.3f} | {ours / peer:.2f} |")
    for what, number in (("the first of ten", 0), ("the tenth", ADAPTERS - 1)):
        ours, peer = (times["ten", who, number] for who in ("hf_lora", "diffusers"))
        print(f"| {what} | {ours:.3f} | {peer:.3f} | {ours / peer:.2f} |")
    sums = {
        who: sum(times["ten", who, number] for number in range(ADAPTERS))
        for who in ("hf_lora", "diffusers")
    }
    print(
        f"| all ten | {sums['hf_lora']:.3f} | {sums['diffusers']:.3f} "
        f"| {sums['hf_lora'] / sums['diffusers']:.2f} |"
    )
    over = {who: sums[who] / times["ten", who, 0] for who in sums}
    print(f"| all ten over the first | {over['hf_lora']:.1f} | {over['diffusers']:.1f} | |")


if __name__ == "__main__":
    main()
