"""QLoRA on a real model: memory of the linear layers, and what training reaches on each base.

SmolLM2-135M-Instruct learns the demo's task (today's English to that of King James) in 24 steps of
eight pairs; the loss is that of 48 held-out pairs, in nats per answer token. Then, on NF4: with all
that is not quantised in float32, as peft's preparation makes it; with DoRA; merged by peft into the
4-bit weights; and the time of one token with the layout of bitsandbytes' inference kernel and
without. CPU only, one thread; takes about 25 minutes.

    python benchmarks/quantised.py [--steps 24] [--only nf4 --only more]
"""

import argparse
import platform
import time
import warnings
from importlib.metadata import version

import peft
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_lora import attach_lora, plan_lora
from hf_lora.demo import Recipe, cached_model, encode, read_pairs, split
from hf_lora.quantised import bytes_in, is_packed

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq", "optimum-quanto")
DTYPE = torch.bfloat16


def four_bit(double):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=DTYPE,
    )


def load(folder, config=None):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPE, quantization_config=config, local_files_only=True
    )


def by_torchao(folder):
    from torchao.quantization import Int8WeightOnlyConfig

    return load(folder, transformers.TorchAoConfig(Int8WeightOnlyConfig()))


def by_hqq(folder):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = load(folder)
    bits = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, bits, compute_dtype=DTYPE, device="cpu")
    return model


BASES = {
    "bf16": load,
    "nf4": lambda folder: load(folder, four_bit(False)),
    "nf4, double": lambda folder: load(folder, four_bit(True)),
    "int8": lambda folder: load(folder, BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": by_torchao,
    "hqq 4 bit": by_hqq,
    "quanto int8": lambda folder: load(folder, transformers.QuantoConfig(weights="int8")),
    "quanto int4": lambda folder: load(folder, transformers.QuantoConfig(weights="int4")),
}


def linears(model):
    """The layers that are targets, which every kind of base quantises."""
    return [model.get_submodule(target.path) for target in plan_lora(model).targets]


def weights_in(model):
    return sum(target.shape[0] * target.shape[1] for target in plan_lora(model).targets)


def others(model):
    """Bytes of all parameters that lie in no target."""
    inside = {id(p) for layer in linears(model) for p in layer.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)


class Text:
    """The demo's pairs as batches of eight, the held-out ones too."""

    def __init__(self, folder, steps):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        lessons, held_out = split(read_pairs(), Recipe(lessons=8 * steps))
        collate = transformers.DataCollatorForSeq2Seq(tokenizer)
        self.lessons, self.held_out = (
            [collate(rows[at : at + 8]) for at in range(0, len(rows), 8)]
            for rows in (
                [encode(tokenizer, pair) for pair in pairs] for pairs in (lessons, held_out)
            )
        )


@torch.no_grad()
def loss(model, text):
    model.eval()
    return sum(model(**batch).loss.item() for batch in text.held_out) / len(text.held_out)


def train(model, text):
    """AdamW at 1e-3, warmed up over two steps and then linear, as Trainer has it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, len(text.lessons))
    for batch in text.lessons:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def measure(model, text, config=None):
    """Returns the loss before, the loss after, and seconds of CPU a step."""
    torch.manual_seed(0)
    attach_lora(model, config=config)
    before, start = loss(model, text), time.process_time()
    train(model, text)
    seconds = (time.process_time() - start) / len(text.lessons)
    return before, loss(model, text), seconds


def on_bases(folder, text, names):
    print("| base | linear layers, MB | bits a weight | loss before | after | s a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names:
        model = BASES[name](folder)
        size, weights = bytes_in(linears(model)), weights_in(model)
        before, after, seconds = measure(model, text)
        print(
            f"| {name} | {size / 1e6:.1f} | {8 * size / weights:.2f} | {before:.3f} | {after:.3f} "
            f"| {seconds:.2f} |",
            flush=True,
        )


def more_on_nf4(folder, text):
    """What is left in bfloat16 made float32 by peft's preparation, DoRA, and peft's own merge."""
    print("\n| NF4 base | what is not quantised, MB | loss before | after | s a step |")
    print("| --- | --- | --- | --- | --- |")
    dora = peft.LoraConfig(r=16, lora_alpha=32, use_dora=True)
    prepare = peft.prepare_model_for_kbit_training
    for name, config in (("as loaded", None), ("prepared by peft", None), ("with DoRA", dora)):
        model = BASES["nf4"](folder)
        if name == "prepared by peft":
            model = prepare(model, use_gradient_checkpointing=False)
        size = others(model)
        before, after, seconds = measure(model, text, config)
        row = f"{name} | {size / 1e6:.1f} | {before:.3f} | {after:.3f} | {seconds:.2f}"
        print(f"| {row} |", flush=True)
        if name == "as loaded":
            for layer in model.modules():
                if isinstance(layer, peft.tuners.lora.bnb.Linear4bit):
                    layer.merge()
            merged = loss(model, text)
    print(f"\nThe first of them, merged by peft into 4 bits again: {merged:.3f}", flush=True)


@torch.no_grad()
def one_token(folder):
    """Milliseconds of CPU for one token of the base, 20 times, in both layouts."""
    model, ids = BASES["nf4"](folder).eval(), torch.tensor([[1]])
    times = {}
    for name in ("as loaded", "repacked by bitsandbytes"):
        for layer in linears(model):
            layer.support_avx512bf16_for_cpu = name != "as loaded"
        model(input_ids=ids)
        start = time.process_time()
        for _ in range(20):
            model(input_ids=ids)
        times[name] = (time.process_time() - start) / 20
        if name != "as loaded" and not is_packed(linears(model)[0]):
            return
    said = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times.items())
    print(f"One token, NF4 base: {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parts = [*BASES, "more"]
    parser.add_argument("--only", action="append", choices=parts, help="these parts alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, one thread, Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    )
    folder = cached_model(print)
    text = Text(folder, args.steps)
    wanted = args.only or parts
    on_bases(folder, text, [name for name in BASES if name in wanted])
    if "more" in wanted:
        more_on_nf4(folder, text)
        one_token(folder)


if __name__ == "__main__":
    main()
