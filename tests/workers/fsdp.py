"""What two processes do with a model that FSDP2 shards, on CPUs; started by torchrun."""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, save_fsdp_model
from peft import AdaLoraConfig
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from hf_lora import as_peft_model, attach_lora, save_lora
from hf_lora.testing import tiny, tiny_batch
from hf_lora.training.sharding import gathered, scattered
from tests.support import randomise
from tests.workers.runs import RUNS, STEPS, Run, adapted, outcome, rank, trainer_of
from tests.workers.sections import run_all


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model):
    """Every trained tensor, put together from the shards by torch alone."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def own_loop(out):
    """A loop without Trainer: saves refused, gathered, written back."""
    torch.distributed.init_process_group("gloo")
    # a rank of 3, of which one process has 2 and the other 1
    model = randomise(adapted(Run(attach={"rank": 3})))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    sharded(model)
    try:
        save_lora(model, out / f"refused{rank()}")
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    with gathered(model):
        if rank() == 0:
            save_lora(model, out / "gathered")
    kinds = {type(p).__name__ for p in model.parameters() if p.requires_grad}
    # the root unit holds on to what it gathered for an evaluation
    with torch.no_grad():
        first = model(**tiny_batch(model)).logits
    other = {n: torch.full_like(t, 0.01) for n, t in before.items()}
    with scattered(model):
        for name, parameter in model.named_parameters():
            if name in other:
                parameter.copy_(other[name])
    with torch.no_grad():
        second = model(**tiny_batch(model)).logits
    return {
        "refused": refused,
        "kinds": kinds,
        "before": before,
        "after": whole(model),
        "first": first,
        "second": second,
    }


def sharded_at_load(out):
    """transformers' own FSDP2, the way that runs on CPUs."""
    if rank() == 0:
        tiny("llama").save_pretrained(out / "base")
    torch.distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(
        out / "base", distributed_config=DistributedConfig(fsdp_size=2)
    )
    trainer = trainer_of(RUNS["plain"], out / "at_load", 2, model=adapted(Run(), rank(), model))
    trainer.train()
    trainer.save_model(str(out / "at_load" / "saved"))
    return outcome(trainer)


def _as_on_gpus(args):
    """Lets accelerate shard: it does so on GPUs, which CPUs here are called.

    Devices and collectives stay those of the CPU.
    """
    assert args.device.type == "cpu"  # asking makes the state of the process
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _trainer(folder, **options):
    options = {"run": RUNS["plain"], "fsdp": True, "prepare": _as_on_gpus} | options
    return trainer_of(folder=folder, processes=2, **options)


def through_accelerate(out):
    trainer = _trainer(out / "accelerate", save_strategy="steps", save_steps=3)
    trainer.train()
    result = outcome(trainer)
    trainer.save_model(str(out / "accelerate" / "saved"))
    return result | {"weights": whole(trainer.model), "fsdp2": trainer.accelerator.is_fsdp2}


def resumed(out):
    trainer = _trainer(out / "resumed", seed=5 + rank())
    trainer.train(resume_from_checkpoint=str(out / "accelerate" / "checkpoint-3"))
    return outcome(trainer) | {"weights": whole(trainer.model)}


def best(out):
    """The best is not the last, and comes back after an evaluation."""
    trainer = _trainer(
        out / "best",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # of losses that fall the first
        learning_rate=0.01,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    trainer.train()
    step = trainer.state.best_model_checkpoint.rpartition("-")[2]
    return {"step": int(step), "weights": whole(trainer.model)}


PARTS = Run(attach={"targets": "qv"})  # parts of one fused projection
FILES = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}  # an optimizer file a process


def in_parts(out):
    options = {"run": PARTS, **FILES}
    trainer = _trainer(
        out / "parts",
        model=adapted(PARTS, 0, tiny("gpt2")),
        save_strategy="steps",
        save_steps=3,
        **options,
    )
    trainer.train()
    again = _trainer(out / "parts_again", model=adapted(PARTS, 5, tiny("gpt2")), **options)
    again.train(resume_from_checkpoint=str(out / "parts" / "checkpoint-3"))
    return {"whole": whole(trainer.model), "resumed": whole(again.model)}


def plain_trainer(out):
    """LoraCallback alone makes the checkpoints of a plain Trainer ordinary adapters."""
    trainer = _trainer(out / "plain", kind=Trainer, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    return whole(trainer.model)


def adalora(out):
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=STEPS, task_type="CAUSAL_LM")
    model = attach_lora(tiny("llama"), config=config)
    _trainer(out / "adalora", model=model).train()


def as_peft(out):
    """accelerate's adapter-only save asks isinstance(PeftModel)."""
    trainer = _trainer(out / "view")
    trainer.train()
    plugin = trainer.accelerator.state.fsdp_plugin
    view = as_peft_model(trainer.model)
    save_fsdp_model(plugin, trainer.accelerator, view, str(out / "view"), adapter_only=True)
    return whole(trainer.model)


if __name__ == "__main__":
    run_all(
        own_loop,
        sharded_at_load,
        through_accelerate,
        resumed,
        best,
        in_parts,
        plain_trainer,
        as_peft,
        adalora,
        refused=("adalora",),
    )
