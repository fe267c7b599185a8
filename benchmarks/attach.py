"""Plan and attach on a Llama-2-70B-shaped model on the meta device, against plain peft.

Three figures, CPU seconds, medians of `--rounds`, interleaved in one process: planning over a bare
walk of `named_modules`; attaching over `peft.inject_adapter_in_model` with the config of the plan;
the tenth adapter over the first, for both. Takes about two minutes.

    python benchmarks/attach.py [--rounds 5]
"""

import argparse
import copy
import gc
import platform
import statistics
import time
import warnings
from collections import defaultdict
from functools import partial

import peft
import torch
import transformers

from hf_lora import attach_lora, plan_lora

SIZES = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
ADAPTERS = 10


def host():
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def cpu(action):
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def inject(model, config, name):
    peft.inject_adapter_in_model(copy.deepcopy(config), model, name, low_cpu_mem_usage=True)


def measure(rounds):
    times = defaultdict(list)
    config = plan_lora(host()).config
    for round_ in range(rounds + 1):
        ours, theirs = host(), host()
        row = {
            "named_modules": cpu(lambda model=ours: list(model.named_modules())),
            "plan": cpu(partial(plan_lora, ours)),
        }
        for number in range(1, ADAPTERS + 1):
            name = f"a{number}"
            row["hf_lora", number] = cpu(partial(attach_lora, ours, name=name))
            row["peft", number] = cpu(partial(inject, theirs, config, name))
        if round_:  # the first one warms up
            for key, seconds in row.items():
                times[key].append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    t = measure(args.rounds)
    print(
        f"{platform.machine()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}; "
        f"median CPU seconds of {args.rounds}"
    )
    print("| what | hf_lora | peer | peer's | ratio |\n| --- | --- | --- | --- | --- |")
    rows = [
        ("plan", t["plan"], "a bare `named_modules()` walk", t["named_modules"]),
        ("attach the first adapter", t["hf_lora", 1], "peft `inject`", t["peft", 1]),
        ("attach the tenth", t["hf_lora", 10], "peft `inject`", t["peft", 10]),
        ("the tenth over our first", t["hf_lora", 10], "hf_lora, first", t["hf_lora", 1]),
        ("peft's tenth over its first", t["peft", 10], "peft, first", t["peft", 1]),
    ]
    for what, own, who, other in rows:
        print(f"| {what} | {own:.4f} | {who} | {other:.4f} | {own / other:.2f} |")


if __name__ == "__main__":
    main()
