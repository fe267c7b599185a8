"""Open, verify, save and load a 135M-shaped adapter with hf_lora and with plain peft, interleaved.

The host is a Llama of SmolLM2-135M's shape with random weights; the adapter has rank 16 on its 210
linears (19.5 MB). hf_lora does all its checks: limits, digest, finite values, base fingerprint.
Prints CPU seconds and their ratios, medians of `--rounds`; takes about a minute.

    python benchmarks/format.py [--rounds 15]
"""

import argparse
import gc
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import peft
import safetensors
import safetensors.torch
import torch
import transformers

from hf_lora import attach_lora, detach_lora, load_lora, open_adapter, save_lora
from hf_lora.formats import read_header

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def host():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def cpu(action):
    gc.collect()
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def measure(rounds):
    times = defaultdict(list)
    model = attach_lora(host())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    base = host()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        for round_ in range(rounds + 1):
            row = {}
            row["save", "hf_lora"], _ = cpu(lambda: save_lora(model, ours))
            row["save", "peft"], _ = cpu(lambda: model.save_pretrained(theirs))
            row["open and verify", "hf_lora"], _ = cpu(lambda: open_adapter(ours))
            row["open and verify", "peft"], _ = cpu(
                lambda: safetensors.torch.load_file(theirs / "adapter_model.safetensors")
            )
            row["header", "hf_lora"], _ = cpu(lambda: read_header(ours))
            row["load", "hf_lora"], report = cpu(lambda: load_lora(base, ours))
            assert report.verified, report
            detach_lora(base)
            for kind, low in (("peft", False), ("peft, low_cpu_mem_usage", True)):
                row["load", kind], view = cpu(
                    lambda low=low: peft.PeftModel.from_pretrained(
                        base, theirs, low_cpu_mem_usage=low
                    )
                )
                view.unload()
            if round_:  # the first one warms up
                for key, seconds in row.items():
                    times[key].append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    times = measure(args.rounds)
    print(
        f"{platform.machine()}, one thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}, peft {peft.__version__}, "
        f"transformers {transformers.__version__}, safetensors {safetensors.__version__}; "
        f"median CPU seconds of {args.rounds}"
    )
    print("| what | hf_lora | peer | peer's | ratio |\n| --- | --- | --- | --- | --- |")
    for (what, who), seconds in times.items():
        if who != "hf_lora":
            ours = times[what, "hf_lora"]
            print(f"| {what} | {ours:.4f} | {who} | {seconds:.4f} | {ours / seconds:.2f} |")
    print(f"| header only | {times['header', 'hf_lora']:.4f} | | | |")


if __name__ == "__main__":
    main()
