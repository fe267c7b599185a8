"""What the base fingerprint sees, what it cannot see, and what it costs.

Prints four tables: more than fifty wrong bases of equal shape, each in nine combinations of
dtypes; how small a change of all values is found; the true bases after more than twenty dtype and
save cycles, every cycle against every other; the CPU time beside that of loading a model of 135 M
parameters. About two minutes on one core.
"""

import copy
import itertools
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hf_lora.fingerprint import fingerprint_of
from hf_lora.verdict import compare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DRAWS = 20
PAIRS = list(itertools.product(DTYPES, repeat=2))  # (stored, host)
SIZES = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 688,
         "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
# Dtypes of the save files, one after the other; the last is the dtype of the host as well.
CYCLES = [
    *((a,) for a in DTYPES),
    *itertools.permutations(DTYPES, 2),
    *itertools.permutations(DTYPES, 3),
    ("fp32", "fp32"),
    ("fp16", "bf16", "fp16"),
    ("bf16", "fp16", "bf16"),
    ("fp16", "bf16", "fp16", "bf16"),
    ("bf16", "fp16", "bf16", "fp16", "fp32"),
    ("fp16", "fp32", "bf16", "fp32"),
    ("bf16", "fp32", "fp16", "fp32"),
]


def llama(seed=0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def vision(seed=0):
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, image_size=28, patch_size=14,
                             projection_dim=64)  # fmt: skip
    text = LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128})
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=1)
    return transformers.LlavaForConditionalGeneration(config)


def unet(seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8)  # fmt: skip


def weights(model):
    return {name: p.detach().float() for name, p in model.named_parameters()}


def cast(tensors, dtype):
    return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}


# --- wrong bases --------------------------------------------------------------------------------


def train(model, optimizer, steps, seed=7):
    """Trains on random tokens and yields the number of steps at 1, 10, 100."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        ids = torch.randint(0, 2000, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10, 100):
            yield step


def fine_tuned(base):
    """Whole models, trained on in fp32 and in bf16."""
    kinds = {
        "AdamW 1e-5": lambda p: torch.optim.AdamW(p, lr=1e-5),
        "AdamW 1e-4": lambda p: torch.optim.AdamW(p, lr=1e-4),
        "SGD 1e-5": lambda p: torch.optim.SGD(p, lr=1e-5),
        "SGD 1e-3": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    for dtype, (kind, make) in itertools.product(("fp32", "bf16"), kinds.items()):
        model = copy.deepcopy(base).to(DTYPES[dtype])
        for steps in train(model, make(model.parameters()), 100):
            yield f"{kind}, {steps} steps in {dtype}", weights(model)


def parts_of_a_llama(base, other):
    """One part from another base, or trained alone."""
    head, embedding, layer = "lm_head.weight", "model.embed_tokens.weight", "model.layers."
    mine, theirs = weights(base), weights(other)
    yield "other head", mine | {head: theirs[head]}
    yield "other embedding", mine | {embedding: theirs[embedding]}
    for rows in (1, 20, 200, 1000):
        mixed = mine[embedding].clone()
        mixed[-rows:] = theirs[embedding][-rows:]
        yield f"{rows} of 2000 rows of the embedding", mine | {embedding: mixed}
    for part in (head, embedding):
        model = copy.deepcopy(base).requires_grad_(False)
        trained = model.get_parameter(part).requires_grad_()
        for steps in train(model, torch.optim.AdamW([trained], lr=1e-5), 10):
            yield f"{part.split('.')[-2]} alone, AdamW 1e-5, {steps} steps", weights(model)
    query = "model.layers.2.self_attn.q_proj.weight"
    yield "one q_proj of another base", mine | {query: theirs[query]}
    swap = {"1": "2", "2": "1"}
    names = {n: n.split(".") for n in mine if n.startswith(layer)}
    swapped = {n: ".".join([*s[:2], swap.get(s[2], s[2]), *s[3:]]) for n, s in names.items()}
    yield "two layers swapped", {n: mine[swapped.get(n, n)] for n in mine}
    yield "another seed", theirs
    norms = {n: t * 1.5 for n, t in mine.items() if t.ndim == 1}
    yield "norms only (no matrix differs)", mine | norms


def edited(base):
    """A LoRA merged into q and v, its delta so much of the weights; a rank-one edit; few values."""
    generator = torch.Generator().manual_seed(3)
    for size in (1e-3, 1e-5):
        mine = weights(base)
        for name, tensor in mine.items():
            if ".q_proj." in name or ".v_proj." in name:
                b = torch.randn(tensor.shape[0], 8, generator=generator)
                a = torch.randn(8, tensor.shape[1], generator=generator)
                mine[name] = tensor + size * 0.02 * (b @ a) / 8**0.5
        yield f"merged LoRA in q and v, {size:.0e} of the weights", mine
    down = "model.layers.2.mlp.down_proj.weight"
    mine = weights(base)
    rows, columns = (torch.randn(n, generator=generator) for n in mine[down].shape)
    yield "rank-one edit of one down_proj", mine | {down: mine[down] + 1e-3 * rows.outer(columns)}
    for part in (1e-2, 1e-3):
        chosen = {n: torch.rand(t.shape, generator=generator) < part for n, t in mine.items()}
        yield (
            f"{part:.1%} of all values set to zero",
            {n: t.masked_fill(chosen[n], 0) for n, t in mine.items()},
        )


def noisy(base):
    generator = torch.Generator().manual_seed(4)
    for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        noise = {n: torch.randn(t.shape, generator=generator) for n, t in weights(base).items()}
        yield (
            f"relative noise {size:.0e}",
            {n: t * (1 + size * noise[n]) for n, t in weights(base).items()},
        )


def parts(mine, theirs, select, label):
    yield f"other {label}", mine | {n: theirs[n] for n in mine if select(n)}
    for size in (1e-3, 1e-5):
        changed = {n: mine[n] * (1 + size * theirs[n].sign()) for n in mine if select(n)}
        yield f"{label} changed by {size:.0e}", mine | changed


def wrong_bases():
    """Yields (host, what is wrong, true weights, wrong weights)."""
    base, other = llama(), llama(1)
    for _ in train(base, torch.optim.AdamW(base.parameters(), lr=1e-3), 20, seed=2):
        pass  # so that it is no bare random start
    rows = (fine_tuned(base), parts_of_a_llama(base, other), edited(base), noisy(base))
    for label, wrong in itertools.chain(*rows):
        yield "llama", label, weights(base), wrong
    mine, theirs = weights(vision()), weights(vision(1))
    for label, wrong in parts(mine, theirs, lambda n: "vision" in n, "vision tower"):
        yield "llava", label, mine, wrong
    mine, theirs = weights(unet()), weights(unet(1))
    one = "down_blocks.0.resnets.0.conv1.weight"
    for label, wrong in parts(mine, theirs, lambda n: n == one, "convolution"):
        yield "unet", label, mine, wrong
    yield "unet", "another seed", mine, theirs


def judge(true, wrong, stored, host):
    """Returns the cell of the table."""
    mine, theirs, given = cast(true, stored), cast(true, host), cast(wrong, host)
    # 1-D tensors are not compared and count all the same: a miss is a miss
    if all(torch.equal(theirs[n], given[n]) for n in theirs):
        return "same"
    state = compare(fingerprint_of(mine.items()), fingerprint_of(given.items())).state
    return {"mismatched": "caught", "unverified": "unsure"}.get(state, "-")


def table_of_wrong_bases():
    print("## Wrong bases of equal shape\n")
    print("Columns: dtype at training / dtype of the host. `caught`: mismatched. `unsure`: not")
    print("verified, with the reason. `-`: missed. `same`: equal to the true base in that dtype.\n")
    print("| host | what is wrong |", " | ".join("/".join(pair) for pair in PAIRS), "|")
    print("|" + " --- |" * (2 + len(PAIRS)))
    counts = {pair: Counter() for pair in PAIRS}
    bases, seen = 0, Counter()
    for kind, label, true, wrong in wrong_bases():
        cells = [judge(true, wrong, *pair) for pair in PAIRS]
        for pair, cell in zip(PAIRS, cells, strict=True):
            counts[pair][cell] += 1
        print(f"| {kind} | {label} |", " | ".join(cells), "|")
        bases += 1
        same = [cell for pair, cell in zip(PAIRS, cells, strict=True) if pair[0] == pair[1]]
        seen["in every dtype"] += all(cell in ("caught", "same") for cell in same)
        seen["in all nine"] += all(cell == "caught" for cell in cells)
    for cell in ("caught", "unsure", "-", "same"):
        print(f"| sum | {cell} |", " | ".join(str(counts[pair][cell]) for pair in PAIRS), "|")
    print(f"\n{bases} wrong bases; {seen['in every dtype']} caught in every dtype in which they")
    print("differ, training and host being of that dtype;", end=" ")
    print(f"{seen['in all nine']} in all nine combinations.\n")


def table_of_limits():
    """Casts act on each value alone, so noise on 32 values a matrix stands for a whole base."""
    print("## Detection limit\n")
    print(f"Relative Gaussian noise on every value, {DRAWS} draws: how often mismatched, in %.\n")
    print("| matrices | noise |", " | ".join("/".join(pair) for pair in PAIRS), "|")
    print("|" + " --- |" * (2 + len(PAIRS)))
    generator = torch.Generator().manual_seed(5)
    for matrices, size in itertools.product((30, 225), (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)):
        caught = Counter()
        for _ in range(DRAWS):
            mine = torch.randn(matrices, 8, 4, generator=generator) * 0.02
            noise = torch.randn(mine.shape, generator=generator)
            bases = [dict(enumerate(t)) for t in (mine, mine * (1 + size * noise))]
            prints = [
                {d: fingerprint_of((str(n), t) for n, t in cast(base, d).items()) for d in DTYPES}
                for base in bases
            ]
            caught.update(
                pair
                for pair in PAIRS
                if compare(prints[0][pair[0]], prints[1][pair[1]]).state == "mismatched"
            )
        cells = (f"{100 * caught[pair] / DRAWS:.0f}" for pair in PAIRS)
        print(f"| {matrices} | {size:.0e} |", " | ".join(cells), "|")
    print()


# --- true bases ---------------------------------------------------------------------------------


def cycled(model, folder):
    """Yields the fingerprint of the model after each of the cycles through real files."""
    kind = type(model)
    name = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    for cycle in CYCLES:
        copied = copy.deepcopy(model).to(DTYPES[cycle[0]])
        for number, dtype in enumerate(cycle):
            place = folder / f"{'-'.join(cycle)}-{number}"
            copied.to(DTYPES[dtype]).save_pretrained(place)
            copied = kind.from_pretrained(place, **{name: DTYPES[dtype]})
        yield fingerprint_of(copied.named_parameters())


def table_of_true_bases():
    print("## The true base after dtype and save cycles\n")
    print(f"{len(CYCLES)} cycles of save_pretrained and from_pretrained, 1 to 5 files long, each")
    print("as the stored side against each as the host.\n")
    print("| host | tensors | comparisons | matched | rounded | not verified | false alarms |")
    print("|" + " --- |" * 7)
    for model in (llama(), vision(), unet()):
        with tempfile.TemporaryDirectory() as folder:
            prints = list(cycled(model, Path(folder)))
        count = Counter(compare(a, b).state for a, b in itertools.product(prints, repeat=2))
        states = ("matched", "rounded", "unverified", "mismatched")
        cells = [len(prints[0].tensors), sum(count.values()), *(count[s] for s in states)]
        print(f"| {type(model).__name__} |", " | ".join(map(str, cells)), "|")
    print()


# --- cost ---------------------------------------------------------------------------------------


def seconds(function):
    begin = time.process_time()
    result = function()
    return result, time.process_time() - begin


def read(model):
    for parameter in model.parameters():
        parameter.sum()


def costs(folder, dtype):
    """Returns CPU seconds of loading, reading all weights once, sampling and comparing."""

    def load():
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])

    loaded, loading = seconds(load)
    found, sampling = seconds(lambda: fingerprint_of(loaded.named_parameters()))
    _, comparing = seconds(lambda: compare(found, found))
    untouched = load()
    _, reading = seconds(lambda: read(untouched))
    return (loading, reading, sampling, comparing), len(json.dumps(found.to_json()))


def table_of_costs():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    print(f"## Cost on a Llama of {size / 1e6:.0f} M parameters in 211 matrices\n")
    print("CPU ms, medians of five. from_pretrained maps the file and reads nothing where no value")
    print("is converted, so that the fingerprint is the first to read its pages.\n")
    print("| file -> host | from_pretrained | all weights read once |", end=" ")
    print("fingerprint | of from_pretrained | compare | JSON, KB |")
    print("|" + " --- |" * 7)
    for file, host in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")):
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(model).to(DTYPES[file]).save_pretrained(folder)
            runs = [costs(folder, host) for _ in range(6)][1:]
        times = [1e3 * statistics.median(t) for t in zip(*(run for run, _ in runs), strict=True)]
        loading, reading, sampling, comparing = times
        print(f"| {file} -> {host} | {loading:.0f} | {reading:.0f} | {sampling:.1f} |", end=" ")
        print(f"{sampling / loading:.1%} | {comparing:.1f} | {runs[0][1] / 1e3:.0f} |")
    print()


def main():
    warnings.filterwarnings("ignore")
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread; Python {platform.python_version()},", end=" ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__},", end=" ")
    print(f"diffusers {diffusers.__version__}\n")
    begin = time.perf_counter()
    table_of_wrong_bases()
    table_of_limits()
    table_of_true_bases()
    table_of_costs()
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
