"""Several processes: two come to what one does, and less than was asked for is refused.

The workers of `tests/workers` run once, all at the same time; a test reads what they wrote.
"""

import argparse
import contextlib
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from hf_lora import (
    BadCheckpoint,
    InvalidOption,
    TrainingError,
    attach_lora,
    load_lora,
    open_adapter,
    save_lora,
)
from hf_lora.testing import tiny
from hf_lora.training.callback import LoraCallback
from hf_lora.training.processes import (
    SEVERAL,
    asked_for,
    check_processes,
    launch_options,
    launcher_options,
    option,
    running,
)
from hf_lora.training.sharding import gathered, sample_base, scattered, unreached
from hf_lora.training.trainer import LoraTrainer
from tests.support import logits, randomise
from tests.workers.ddp import DROPS
from tests.workers.fsdp import PARTS
from tests.workers.launch import launch, result
from tests.workers.runs import (
    APART,
    RUNS,
    STEPS,
    TOGETHER,
    Run,
    adapted,
    arguments,
    collate,
    data_of,
    outcome,
    trainer_of,
)

# --- the guard, row by row ------------------------------------------------------------------


def state(processes=1, kind="NO", *, fsdp2=False, device="cpu"):
    """What accelerate says of a run."""
    return SimpleNamespace(
        num_processes=processes,
        distributed_type=DistributedType[kind],
        is_fsdp2=fsdp2,
        device=torch.device(device),
    )


def args(**fields):
    """What the guard reads of TrainingArguments."""
    return SimpleNamespace(**({"fsdp": None, "fsdp_plugin_args": None, "n_gpu": 1} | fields))


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
TWO = {"WORLD_SIZE": "2"}
FSDP = {"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}


@pytest.mark.parametrize(
    ("fields", "runs", "environ", "options"),
    [
        ({}, state(), {}, None),
        ({}, state(), {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, None),
        ({}, state(2, "MULTI_CPU"), TWO, None),
        ({}, state(2, "MULTI_GPU", device="cuda"), TWO, None),
        ({}, state(2, "MULTI_CPU"), {"PMI_SIZE": "2"}, None),
        # one torchrun on each of two nodes, started by mpirun
        ({}, state(16, "MULTI_GPU", device="cuda"), {"PMI_SIZE": "2", "WORLD_SIZE": "16"}, None),
        ({}, state(), LAUNCHED, ["--num_processes", "1"]),
        ({}, state(), LAUNCHED | {"MASTER_PORT": "1"}, ["--num_processes=1"]),
        ({}, state(), LAUNCHED, []),
        ({}, state(2, "MULTI_GPU"), LAUNCHED | TWO, ["--num-processes", "2"]),
        (FSDP, state(2, "FSDP", fsdp2=True, device="cuda"), TWO, None),
        # accelerate leaves the switch in the environment, and no version
        (FSDP, state(2, "FSDP", fsdp2=True), TWO | {"ACCELERATE_USE_FSDP": "true"}, None),
        ({}, state(2, "FSDP", fsdp2=True), {"ACCELERATE_USE_FSDP": "true", **TWO}, None),
        ({}, state(), {"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "1"}, None),
        ({}, state(8, "XLA", device="xla"), TWO, None),  # torch_xla counts cores
    ],
)
def test_what_was_asked_for_runs_without_a_word(fields, runs, environ, options):
    found = check_processes(args(**fields), runs, environ=environ, launch=options)
    assert found.processes == runs.num_processes


@pytest.mark.parametrize(
    ("fields", "runs", "environ", "options", "fact", "fix"),
    [
        (
            {},
            state(),
            LAUNCHED,
            ["--cpu", "--num_processes", "2"],
            "2 processes were asked for (accelerate launch --num_processes 2) and 1 runs",
            "torchrun --nproc_per_node 2 and TrainingArguments(use_cpu=True)",
        ),
        ({}, state(), LAUNCHED, ["--num-processes=4"], "4 processes", "--nproc_per_node 4"),
        (
            {},
            state(),
            TWO,
            None,
            "2 processes were asked for (WORLD_SIZE=2 in the environment, as torchrun sets it)",
            "use_cpu=True",
        ),
        ({}, state(device="cuda"), TWO, None, "and 1 runs", "or ask for 1 where you asked"),
        ({}, state(), {"OMPI_COMM_WORLD_SIZE": "3"}, None, "as mpirun sets it", "torchrun"),
        (
            {},
            state(2, "MULTI_CPU"),
            LAUNCHED | TWO,
            ["--num_processes", "1"],
            "1 process was asked for (accelerate launch --num_processes 1) and 2 run",
            "without a launcher",
        ),
        (
            FSDP,
            state(2, "MULTI_CPU"),
            TWO,
            None,
            "FSDP2 was asked for (TrainingArguments(fsdp=...)) and DDP runs: accelerate shards on "
            "GPUs and their like, never on CPUs",
            "distributed_config=DistributedConfig(fsdp_size=2)",
        ),
        (
            {},
            state(2, "MULTI_CPU"),
            TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            None,
            "FSDP2 was asked for (ACCELERATE_USE_FSDP=true in the environment) and DDP runs",
            "Leave it out",
        ),
        (
            {},
            state(2, "FSDP"),
            TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            None,
            "FSDP2 was asked for (ACCELERATE_USE_FSDP=true in the environment) and FSDP1 runs",
            "Leave it out",
        ),
        ({}, state(), {"ACCELERATE_USE_FSDP": "true"}, None, "one process runs", "fsdp_size=N"),
        (
            {},
            state(),
            LAUNCHED,
            ["--use_fsdp", "--fsdp_version", "2"],
            "FSDP2 was asked for (accelerate launch --use_fsdp) and one process runs",
            "fsdp_size=N",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            state(2, "MULTI_GPU", device="cuda"),
            TWO,
            None,
            "DeepSpeed was asked for (TrainingArguments(deepspeed=...)) and DDP runs",
            "so that DeepSpeed can run",
        ),
        (
            {},
            state(2, "MULTI_GPU", device="cuda"),
            TWO | {"ACCELERATE_USE_MEGATRON_LM": "true"},
            None,
            "Megatron-LM was asked for",
            "Drop it",
        ),
        ({}, state(2, "FSDP"), TWO, None, "FSDP1 flattens", 'fsdp_config={"version": 2}'),
        ({}, state(2, "DEEPSPEED"), TWO, None, "sharded or empty adapters", "FSDP2"),
        ({}, state(2, "MEGATRON_LM"), TWO, None, "replaces the layers", "torchrun"),
        (
            {"n_gpu": 4},
            state(device="cuda"),
            {},
            None,
            "one process would use 4 GPUs, which nobody asked for",
            "CUDA_VISIBLE_DEVICES=0",
        ),
    ],
)
def test_less_more_or_other_than_was_asked_for_is_refused(
    fields, runs, environ, options, fact, fix
):
    with pytest.raises(TrainingError) as refusal:
        check_processes(args(**fields), runs, environ=environ, launch=options)
    assert fact in refusal.value.fact
    assert fix in refusal.value.fix


def test_a_number_said_to_the_guard_decides_alone():
    two = state(2, "MULTI_CPU")
    assert check_processes(args(), two, processes=2, environ={"WORLD_SIZE": "7"}).processes == 2
    with pytest.raises(TrainingError, match=r"3 processes were asked for \(processes=3\) and 2"):
        check_processes(args(), two, processes=3, environ=TWO)
    for wrong in (0, -1, True, 2.0, "2"):
        with pytest.raises(InvalidOption, match="no positive whole number"):
            check_processes(args(), two, processes=wrong)


def test_a_model_that_transformers_shards_at_load_counts_as_fsdp(one_process):
    model = fully_shard(tiny("llama"), mesh=one_process)
    found = running(args(), state(2, "MULTI_CPU"), model)
    assert (found.strategy, found.processes) == ("FSDP2", 2)
    assert running(args(), state(2, "MULTI_CPU"), tiny("llama")).strategy == "DDP"


# --- what accelerate's launcher leaves behind ------------------------------------------------


def test_accelerates_own_environment_for_two_processes_is_recognised(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)

    def environment_for(processes):
        fields = {"num_processes": processes, "num_machines": 1, "cpu": True, "use_cpu": True}
        launcher = argparse.Namespace(
            **fields,
            **dict.fromkeys(("no_python", "module", "debug", "enable_cpu_affinity"), False),
            **dict.fromkeys(("mpirun_hostfile", "main_process_ip", "main_process_port")),
            **{f"dynamo_{x}": False for x in ("use_fullgraph", "use_dynamic")},
            dynamo_use_regional_compilation=False,
            dynamo_backend="no",
            dynamo_mode="default",
            training_script="train.py",
            training_script_args=[],
            gpu_ids="all",
            mixed_precision="no",
            num_cpu_threads_per_process=1,
        )
        return prepare_simple_launcher_cmd_env(launcher)[1]

    nowhere = Path("/nowhere")  # a system that does not show its processes
    monkeypatch.setattr(
        "hf_lora.training.processes.launch_options", lambda: launch_options(nowhere)
    )
    (wish,) = asked_for(args(), environ=environment_for(2))
    assert wish.processes == SEVERAL
    with pytest.raises(TrainingError, match=r"several processes were asked for .* and 1 runs"):
        check_processes(args(), state(), environ=environment_for(2))
    assert list(asked_for(args(), environ=environment_for(1))) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /usr/bin/accelerate launch --cpu train.py --num_processes 9", ("--cpu",)),
        ("/usr/bin/accelerate-launch --num_processes 2 train.py --num_processes 9", None),
        ("python -m accelerate.commands.launch --num-processes=2 train.py", None),
        ("python -m accelerate.commands.accelerate_cli launch --num-processes=2 train.py", None),
        ("C:\\bin\\accelerate.exe launch --num_processes 2 train.py", None),
        ("python -m torch.distributed.run --nproc_per_node 2 train.py", ()),
        ("python accelerate launch", ()),
        ("bash -c launch", ()),
        ("", ()),
    ],
)
def test_a_launchers_options_end_where_the_script_begins(command, expected):
    """`expected` None stands for two processes, () for no launcher."""
    own = (
        ["python", "train.py", *command.split()[command.split().index("train.py") + 1 :]]
        if ("train.py" in command)
        else ["python", "train.py"]
    )
    options = launcher_options(command.split(), own)
    if expected is None:
        assert option(options, "num_processes") == "2"
    elif expected == () and command != "python accelerate launch":
        assert options is None
    else:
        assert options == expected


def processes_in(root, own, *ancestors):
    """Writes process files as Linux shows them: this process, its parent, that one's, ..."""
    pids = [os.getppid(), *range(900_000, 900_000 + len(ancestors))]
    (root / "self").mkdir(parents=True)
    (root / "self" / "cmdline").write_text("\0".join(own) + "\0")
    for pid, parent, command in zip(pids, pids[1:], ancestors, strict=False):
        (root / str(pid)).mkdir()
        (root / str(pid) / "cmdline").write_text("\0".join(command) + "\0")
        (root / str(pid) / "stat").write_text(f"{pid} (a ) b) S {parent} 1 1 0")
    return root


def test_a_launcher_is_found_behind_a_shell(tmp_path):
    own = ["python", "train.py", "--num_processes", "9"]
    script = ["accelerate", "launch", "--num_processes", "2", "--no_python", "run.sh"]
    root = processes_in(tmp_path / "a", own, ["bash", "run.sh"], ["mpirun", "bash"], script)
    assert option(launch_options(root), "num_processes") == "2"
    assert launch_options(processes_in(tmp_path / "b", own, ["bash"], ["init"])) is None
    assert launch_options(tmp_path / "missing") is None


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_processes: {count}
use_cpu: true
"""


@pytest.mark.parametrize(
    ("kind", "count", "options", "fact"),
    [
        ("MULTI_CPU", 2, [], "2 processes were asked for (the config file of accelerate launch"),
        ("FSDP", 1, [], "FSDP was asked for (the config file of accelerate launch"),
        ("MULTI_CPU", 2, ["--num_processes", "1"], ""),
        ("'NO'", 1, [], ""),
    ],
)
def test_the_config_file_of_the_launcher_is_a_wish(tmp_path, kind, count, options, fact):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(kind=kind, count=count))
    options = ["--config_file", str(file), *options]
    expected = pytest.raises(TrainingError) if fact else contextlib.nullcontext()
    with expected as refusal:
        check_processes(args(), state(), environ=LAUNCHED, launch=options)
    if fact:
        assert fact in refusal.value.fact
        assert str(file) in refusal.value.fact


def test_a_config_file_that_is_gone_states_nothing(tmp_path):
    options = ["--config_file", str(tmp_path / "gone.yaml")]
    assert list(asked_for(args(), environ=LAUNCHED, launch=options)) == []


# --- the guard in a run ----------------------------------------------------------------------


def test_a_trainer_refuses_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="and one process runs"):
        trainer_of(Run(), tmp_path, 1).train()


def test_the_callback_refuses_in_a_plain_trainer_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer = Trainer(
        model=adapted(Run()),
        args=arguments(Run(), tmp_path, 1),
        train_dataset=data_of(Run()),
        data_collator=collate,
        callbacks=[LoraCallback(pictures=False)],
    )
    with pytest.raises(TrainingError, match="and one process runs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_number_in_the_callback_is_a_wish_and_overrules_a_launcher(tmp_path, monkeypatch):
    def trainer(processes):
        return LoraTrainer(
            model=adapted(Run()),
            args=arguments(Run(), tmp_path, 1),
            train_dataset=data_of(Run()),
            data_collator=collate,
            callbacks=[LoraCallback(processes=processes, report=False)],
        )

    with pytest.raises(TrainingError, match=r"2 processes were asked for \(processes=2\)"):
        trainer(2).train()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(
        "hf_lora.training.processes.launch_options", lambda: ("--num_processes", "2")
    )
    with pytest.raises(TrainingError, match="accelerate launch --num_processes 2"):
        trainer(None).train()
    assert trainer(1).train().global_step == STEPS


# --- two processes ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    """Runs all workers, once also where several test processes share the session."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workers"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            (root / "out").mkdir()
            launch(root / "out")
            (root / "done").touch()
    return root / "out"


@pytest.fixture(scope="session")
def read(workers):
    """Returns what (worker, section) came to in each of its processes; an error fails the test."""

    def call(worker, section, *, ranks=2, error=False):
        found = [result(workers, worker, section, rank) for rank in range(ranks)]
        for one in found:
            failed = isinstance(one, dict) and "trace" in one
            assert failed == error, one["trace"] if failed else one
        return found

    return call


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Returns what one process makes of a run."""

    def call(run, seed):
        trainer = trainer_of(run, tmp_path_factory.mktemp("alone"), 1, seed=seed)
        trainer.train()
        return outcome(trainer)

    return call


def apart(a, b):
    """The largest difference of two sets of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_of_torchrun_are_ddp(read):
    for found in read("ddp", "strategy"):
        assert found == {"processes": 2, "strategy": "DDP", "device": "cpu"}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_come_to_what_one_does(read, alone, name):
    first, second = (found[name] for found in read("ddp", "runs"))
    one = alone(RUNS[name], seed=100)  # what process 0 began with
    assert apart(first["weights"], second["weights"]) == 0
    assert apart(first["before"], second["before"]) > 0.1  # their own random A, until DDP begins
    assert apart(first["weights"], first["before"]) > 1e-4
    # sums are rounded in another order; measured 1.5e-8
    assert apart(first["weights"], one["weights"]) < 1e-6
    assert len(one["losses"]) == STEPS
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert first["norms"] == pytest.approx(one["norms"], abs=1e-6)


def test_the_mean_of_each_processs_own_tokens_would_be_another_run(read, alone):
    """That test can fail: without `average_tokens_across_devices` padding makes a difference."""
    found, _ = read("ddp", "runs")
    one = alone(TOGETHER, seed=100)["weights"]
    assert apart(found["together"]["weights"], one) < 1e-6  # rounding, as above
    assert apart(found["apart"]["weights"], one) > 1e-4
    assert APART.lengths == TOGETHER.lengths


def test_a_layer_that_is_not_reached_stays_as_it_was(read):
    for found in read("ddp", "unreached_is_left"):
        change = {
            n: float((t - found["before"][n]).abs().max()) for n, t in found["weights"].items()
        }
        assert {name for name, by in change.items() if by == 0} == {
            name for name in change if ".layers.1." in name
        }


def test_where_ddp_waits_for_all_an_unreached_layer_is_named(read):
    for found in read("ddp", "unreached_is_named", error=True):
        assert found["error"] == "TrainingError"
        assert "14 parameters of the adapter got no gradient" in found["text"]
        assert "model.layers.1.self_attn.q_proj.lora_A" in found["text"]
        assert "ddp_find_unused_parameters=True" in found["text"]


def test_other_errors_of_a_step_are_left_alone():
    assert unreached(RuntimeError("out of memory"), tiny("llama")) is None


def test_two_processes_resume_to_the_same_bits(read):
    whole, resumed = read("ddp", "uninterrupted"), read("ddp", "resumed")
    for rank in (0, 1):
        assert apart(whole[rank]["weights"], resumed[rank]["weights"]) == 0
        assert whole[rank]["losses"] == resumed[rank]["losses"]  # the first three come back too


def test_one_process_does_not_resume_what_two_saved(workers, read, tmp_path):
    read("ddp", "uninterrupted")
    trainer = trainer_of(DROPS, tmp_path, 1)
    with pytest.raises(BadCheckpoint, match="saved by 2 processes, and 1 are running"):
        trainer.train(resume_from_checkpoint=str(workers / "ddp" / "saved" / "checkpoint-3"))


def test_the_checkpoint_of_two_processes_is_an_ordinary_adapter(workers, read):
    found, _ = read("ddp", "uninterrupted")
    model = tiny("llama")
    load_lora(model, workers / "ddp" / "saved" / f"checkpoint-{STEPS}", name="default")
    loaded = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert apart(loaded, found["weights"]) == 0


# --- the silent downgrades, as they happen ------------------------------------------------------


def test_accelerate_launch_on_cpus_starts_one_process_and_is_refused(read):
    (options,) = read("guard", "options", ranks=1)
    assert options == ("--cpu", "--num_processes", "2")
    (found,) = read("guard", "trained", ranks=1, error=True)
    assert found["error"] == "TrainingError"
    assert "(accelerate launch --num_processes 2) and 1 runs" in found["text"]


def test_fsdp_on_cpus_would_be_ddp_and_is_refused(read):
    for found in read("ddp", "fsdp_asked", error=True):
        assert found["error"] == "TrainingError"
        assert "FSDP2 was asked for (TrainingArguments(fsdp=...)) and DDP runs" in found["text"]


def test_torchrun_without_use_cpu_would_train_twice_and_is_refused(read):
    for found in read("ddp", "use_cpu_forgotten", error=True):
        assert found["error"] == "TrainingError"
        assert "2 processes were asked for (WORLD_SIZE=2" in found["text"]


# --- FSDP2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["sharded_at_load", "through_accelerate"])
def test_a_sharded_run_comes_to_what_one_process_does(read, alone, section):
    one = alone(RUNS["plain"], seed=0)
    for found in read("fsdp", section):
        # sums are rounded in another order; measured 7.5e-9
        assert apart(found["weights"], one["weights"]) < 1e-6
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert found["norms"] == pytest.approx(one["norms"], abs=1e-6)


@pytest.mark.parametrize(
    ("section", "folder"), [("sharded_at_load", "at_load"), ("through_accelerate", "accelerate")]
)
def test_a_sharded_run_saves_the_whole_adapter(workers, read, section, folder):
    found, _ = read("fsdp", section)
    saved = workers / "fsdp" / folder / "saved"
    adapter = open_adapter(saved)
    assert adapter.manifest.host == "LlamaForCausalLM"
    judge = PeftModel.from_pretrained(tiny("llama"), saved)  # plain peft
    loaded = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in judge.state_dict().items()
        if "lora_" in name
    }
    assert apart(loaded, found["weights"]) == 0


def test_the_base_of_a_sharded_run_is_known_by_what_it_was_before(workers, read):
    read("fsdp", "through_accelerate")
    saved = workers / "fsdp" / "accelerate" / "saved"
    assert "matched" in str(load_lora(tiny("llama"), saved))


def test_a_sharded_checkpoint_holds_no_base(workers, read):
    read("fsdp", "through_accelerate")
    folder = workers / "fsdp" / "accelerate" / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert "optimizer.bin" in names
    assert not {name for name in names if "pytorch_model" in name or name == "model.safetensors"}


def test_a_sharded_run_resumes_to_the_same_bits(read):
    whole, resumed = read("fsdp", "through_accelerate"), read("fsdp", "resumed")
    for rank in (0, 1):
        assert apart(whole[rank]["weights"], resumed[rank]["weights"]) == 0


def test_the_best_sharded_adapter_comes_back(workers, read):
    found, _ = read("fsdp", "best")
    assert found["step"] < STEPS
    best = workers / "fsdp" / "best" / f"checkpoint-{found['step']}" / "adapter_model.safetensors"
    saved = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(best).items()
    }
    assert apart(saved, found["weights"]) == 0


def test_parts_of_a_projection_are_sharded_saved_and_resumed_too(workers, read, tmp_path):
    for found in read("fsdp", "in_parts"):
        assert apart(found["whole"], found["resumed"]) == 0
    folder = workers / "fsdp" / "parts"
    assert (folder / "checkpoint-3" / "optimizer_0").is_dir()  # a file of each process
    model = adapted(PARTS, 0, tiny("gpt2"))
    for name, parameter in model.named_parameters():
        if name in found["whole"]:
            parameter.data.copy_(found["whole"][name])
    save_lora(model, tmp_path)
    assert open_adapter(tmp_path).digest == open_adapter(folder / f"checkpoint-{STEPS}").digest


def test_the_callback_saves_the_whole_adapter_of_a_plain_trainer(workers, read):
    found, _ = read("fsdp", "plain_trainer")
    model = tiny("llama")
    load_lora(model, workers / "fsdp" / "plain" / f"checkpoint-{STEPS}", name="default")
    loaded = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert apart(loaded, found) == 0


def test_adalora_is_refused_where_its_factors_are_in_shards(read):
    for found in read("fsdp", "adalora", error=True):
        assert found["error"] == "TrainingError"
        assert "AdaLoRA chooses its ranks from whole factors" in found["text"]


def test_one_process_alone_cannot_save_a_shard(workers, read):
    for rank, found in enumerate(read("fsdp", "own_loop")):
        assert found["kinds"] == {"DTensor"}
        assert found["refused"].startswith("TrainingError")
        assert not (workers / "fsdp" / f"refused{rank}").exists()


def test_a_loop_of_ones_own_saves_what_all_gathered(workers, read):
    found, _ = read("fsdp", "own_loop")
    saved = load_file(workers / "fsdp" / "gathered" / "adapter_model.safetensors")
    named = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in saved.items()
    }
    assert apart(named, found["before"]) == 0


def test_whole_values_written_into_shards_are_what_the_model_computes_with(read):
    first, second = read("fsdp", "own_loop")
    assert all(bool((tensor == 0.01).all()) for tensor in first["after"].values())
    assert not torch.equal(first["first"], first["second"])
    assert torch.equal(first["second"], second["second"])
    model = adapted(Run(attach={"rank": 3}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.01)
    # FSDP2 multiplies gathered copies of the same weights; only their memory layout differs
    torch.testing.assert_close(first["second"], logits(model), atol=1e-6, rtol=0)


def test_accelerates_adapter_only_save_takes_the_view(workers, read):
    found, _ = read("fsdp", "as_peft")
    saved = torch.load(workers / "fsdp" / "view" / "pytorch_model_fsdp.bin", weights_only=True)
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    assert apart(named, found) == 0


# --- shards on a mesh of one process ------------------------------------------------------------


@pytest.fixture
def one_process():
    """A process group of this process alone, in which FSDP2 makes shards that are whole."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


KINDS = {
    "lora": ("llama", "lm", {"rank": 3}),
    "dora": ("llama", "lm", {"config": LoraConfig(r=3, use_dora=True)}),
    "head": ("llama", "classifier", {"rank": 3}),
    "parts": ("gpt2", "lm", {"rank": 3, "targets": "qv"}),
    "embedding": ("llama", "lm", {"config": LoraConfig(r=3, target_modules=["embed_tokens"])}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_factor_is_read_and_written_whole(kind, one_process, tmp_path):
    family, task, options = KINDS[kind]
    model = randomise(attach_lora(tiny(family, task=task), **options))
    save_lora(model, tmp_path / "before")
    before = load_file(tmp_path / "before" / "adapter_model.safetensors")
    fully_shard(model, mesh=one_process)
    with pytest.raises(TrainingError):
        save_lora(model, tmp_path / "shard")
    with gathered(model):
        save_lora(model, tmp_path / "after")
    after = load_file(tmp_path / "after" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with scattered(model):
        for parameter in model.parameters():
            if type(parameter).__name__ != "DTensor" and not parameter.requires_grad:
                parameter.fill_(0.25)
    assert {type(p).__name__ for p in model.parameters() if p.requires_grad} == {"DTensor"}
    trained = [p.full_tensor() for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(bool((tensor == 0.25).all()) for tensor in trained)


def test_values_written_after_an_evaluation_are_those_of_the_next_one(one_process):
    """The outermost unit computes on with what it gathered, and drops it only later."""
    model = fully_shard(randomise(adapted(Run())), mesh=one_process)
    before = logits(model)
    assert "DTensor" not in {type(p).__name__ for p in model.parameters()}  # gathered still
    with scattered(model):
        for parameter in model.parameters():
            if type(parameter).__name__ != "DTensor":
                parameter.fill_(0.01)
    model.reshard()
    assert all(bool((p.full_tensor() == 0.01).all()) for p in model.parameters() if p.requires_grad)
    assert not torch.equal(logits(model), before)


def test_an_error_while_writing_leaves_the_shards_as_they_were(one_process):
    model = fully_shard(randomise(adapted(Run())), mesh=one_process)
    before = [p.full_tensor() for p in model.parameters()]

    def write_and_fail():
        with scattered(model):
            for parameter in model.parameters():
                if type(parameter).__name__ != "DTensor":
                    parameter.fill_(0.25)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert all(
        torch.equal(a, p.full_tensor()) for a, p in zip(before, model.parameters(), strict=True)
    )


def test_on_a_whole_model_gathering_changes_nothing(tmp_path):
    model = randomise(adapted(Run()))
    parameters = list(model.parameters())
    with gathered(model), scattered(model):
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        save_lora(model, tmp_path)
    assert open_adapter(tmp_path).parameters == sum(
        p.numel() for p in parameters if p.requires_grad
    )


def test_an_empty_factor_is_not_saved(tmp_path):
    """What ZeRO-3 leaves in each process: peft writes it (peft issue 453)."""
    model = adapted(Run())
    factor = model.model.layers[0].self_attn.q_proj.lora_A["default"]
    factor.weight.data = torch.empty(0)
    with pytest.raises(TrainingError, match="self_attn.q_proj.lora_A"):
        save_lora(model, tmp_path / "adapter")
    with pytest.raises(TrainingError), gathered(model):
        save_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_that_is_sharded_already_is_not_sampled(one_process, tmp_path):
    model = fully_shard(randomise(adapted(Run())), mesh=one_process)
    sample_base(model)
    with gathered(model):
        save_lora(model, tmp_path)
    assert open_adapter(tmp_path).manifest.base.fingerprints == {}
