"""Several processes: a run goes on only as the strategy, and on as many, as was asked for.

accelerate and Trainer choose a strategy by what they find, and where that is less than was asked
for they go on without a word: `accelerate launch --cpu --num_processes 2` runs one process, FSDP on
CPUs is DDP, two processes that find no GPU each train alone, and one process that finds several
GPUs trains on all of them. Every place where a wish can be stated is a row here; `check_processes`
compares them with what runs.

Read in accelerate 1.15 (`state.py`, `commands/launch.py`, `utils/launch.py`), transformers 5.23.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.errors import InvalidOption, TrainingError, shown
from hf_lora.training.sharding import is_sharding

SEVERAL = -1  # more than one process, the number is not known

ALONE, DDP, DATA_PARALLEL = "one process", "DDP", "DataParallel"
FSDP1, FSDP2, ZERO, MEGATRON, XLA = "FSDP1", "FSDP2", "DeepSpeed", "Megatron-LM", "XLA"
_FSDP = "FSDP"  # of either version

# accelerate's DistributedType -> what it is called here; its MULTI_ kinds are DDP on some device.
_STRATEGIES: Mapping[str, str] = {
    "NO": ALONE,
    "FSDP": FSDP1,
    "DEEPSPEED": ZERO,
    "MEGATRON_LM": MEGATRON,
    "XLA": XLA,
}

# Where launchers say how many processes they started: variable -> who sets it. The first counts.
_SIZES: Mapping[str, str] = {
    "WORLD_SIZE": "torchrun",
    "PMI_SIZE": "mpirun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
# Switches of accelerate in the environment: variable -> strategy.
_SWITCHES: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": _FSDP,
    "ACCELERATE_USE_DEEPSPEED": ZERO,
    "ACCELERATE_USE_MEGATRON_LM": MEGATRON,
}
# The same as options of `accelerate launch`, and as the `distributed_type` of its config file.
_OPTIONS: Mapping[str, str] = {
    "use_fsdp": _FSDP,
    "use_deepspeed": ZERO,
    "use_megatron_lm": MEGATRON,
}
_TYPES: Mapping[str, str] = {"FSDP": _FSDP, "DEEPSPEED": ZERO, "MEGATRON_LM": MEGATRON}

# How `accelerate launch` looks in a command line.
_LAUNCHERS: tuple[tuple[str, ...], ...] = (
    ("accelerate", "launch"),
    ("accelerate-launch",),
    ("accelerate.commands.launch",),
    ("accelerate.commands.accelerate_cli", "launch"),
)
_OF_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set in every process that it launches
_GENERATIONS = 8  # ancestors that are looked at: mpirun and shells stand in between

# Strategies that run, and whose checkpoints would not hold the adapter: strategy -> (why, fix).
_REFUSED: Mapping[str, tuple[str, str]] = {
    FSDP1: (
        "FSDP1 flattens an adapter's factors together with the base",
        'Use FSDP2: fsdp_config={"version": 2}, or accelerate launch --fsdp_version 2.',
    ),
    ZERO: (
        "DeepSpeed is not supported: its ZeRO stages save sharded or empty adapters",
        "Use DDP (torchrun), or FSDP2: TrainingArguments(fsdp=True).",
    ),
    MEGATRON: (
        "Megatron-LM replaces the layers that the adapter is attached to",
        "Use DDP (torchrun), or FSDP2: TrainingArguments(fsdp=True).",
    ),
}


@dataclass(frozen=True)
class Wish:
    """What one place says was asked for.

    Attributes:
        where: The place, as a user would write it.
        processes: Number of processes over all machines; 0 where it says nothing of that.
        strategy: A strategy, or the beginning of its name; empty where it says nothing of that.
    """

    where: str
    processes: int = 0
    strategy: str = ""


@dataclass(frozen=True)
class Running:
    """What runs.

    Attributes:
        processes: Number of processes over all machines.
        strategy: What they do together.
        device: Kind of device, `cpu` or `cuda`.
        copies: Copies of the model in each process; more than one under DataParallel.
    """

    processes: int
    strategy: str
    device: str
    copies: int = 1


def check_processes(
    args: Any,
    state: Any,
    *,
    model: nn.Module | None = None,
    processes: int | None = None,
    environ: Mapping[str, str] | None = None,
    launch: Sequence[str] | None = None,
) -> Running:
    """Checks that what runs is what was asked for; says nothing where nothing was.

    Args:
        args: The run's `TrainingArguments`.
        state: `trainer.accelerator.state`, or `AcceleratorState()` inside a callback.
        model: The model that is trained, which may have been loaded sharded.
        processes: How many processes there should be. Decides alone where given.
        environ: Environment variables; None for those of this process.
        launch: Options of the `accelerate launch` that started this process; None to find them.

    Returns:
        What runs.

    Raises:
        TrainingError: Fewer or more processes run, another strategy does, one that cannot save an
            adapter, or Trainer spreads one process over several GPUs.
        InvalidOption: `processes` is no positive whole number.
    """
    if processes is not None and (type(processes) is not int or processes < 1):
        raise InvalidOption(
            f"processes={shown(processes)} is no positive whole number", field="processes"
        )
    found = running(args, state, model)
    wishes = list(asked_for(args, environ=environ, launch=launch))
    if processes is not None:
        wishes = [w for w in wishes if not w.processes] + [
            Wish(f"processes={processes}", processes=processes)
        ]
    for wish in wishes:
        _check_size(wish, found)
        _check_strategy(wish, found)
    if found.copies > 1:
        raise TrainingError(
            f"one process would use {found.copies} GPUs, which nobody asked for: Trainer takes "
            f"{found.copies} times per_device_train_batch_size and wraps the model in "
            "nn.DataParallel",
            fix=f"For one GPU set CUDA_VISIBLE_DEVICES=0 before torch is imported; for all start "
            f"it with torchrun --nproc_per_node {found.copies}.",
        )
    if found.strategy in _REFUSED:
        fact, fix = _REFUSED[found.strategy]
        raise TrainingError(fact, fix=fix)
    return found


def running(args: Any, state: Any, model: nn.Module | None = None) -> Running:
    """Returns what runs, see `check_processes` for the arguments."""
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    strategy = _STRATEGIES.get(kind, DDP)
    if getattr(state, "is_fsdp2", False) or (model is not None and is_sharding(model)):
        strategy = FSDP2  # accelerate's, or transformers' own (`DistributedConfig`)
    # n_gpu counts the GPUs of a process that is not distributed, and is 0 on CPUs
    copies = max(1, getattr(args, "n_gpu", 1)) if strategy == ALONE else 1
    return Running(
        processes=int(state.num_processes),
        strategy=DATA_PARALLEL if copies > 1 else strategy,
        device=str(getattr(getattr(state, "device", None), "type", "cpu")),
        copies=copies,
    )


def asked_for(
    args: Any,
    *,
    environ: Mapping[str, str] | None = None,
    launch: Sequence[str] | None = None,
) -> Iterator[Wish]:
    """Yields every wish that is stated anywhere, see `check_processes` for the arguments."""
    environ = os.environ if environ is None else environ
    plugin = getattr(args, "fsdp_plugin_args", None)  # None for FSDP of torch_xla
    if getattr(args, "fsdp", None) and plugin:
        version = plugin.get("fsdp_version", "")
        yield Wish("TrainingArguments(fsdp=...)", strategy=f"{_FSDP}{version}")
    if getattr(args, "deepspeed", None):
        yield Wish("TrainingArguments(deepspeed=...)", strategy=ZERO)
    for name, strategy in _SWITCHES.items():
        if environ.get(name, "").lower() == "true":
            # accelerate sets the switch, not the version, when args ask for FSDP
            version = environ.get("FSDP_VERSION", "") if strategy == _FSDP else ""
            yield Wish(f"{name}={environ[name]} in the environment", strategy=strategy + version)
    size = next((n for n in _SIZES if environ.get(n, "").isdecimal() and int(environ[n])), "")
    if size:  # the others are then those of a launcher of launchers, and count nodes
        where = f"{size}={environ[size]} in the environment, as {_SIZES[size]} sets it"
        yield Wish(where, processes=int(environ[size]))
    if _OF_ACCELERATE in environ:
        yield from _launched(environ, launch_options() if launch is None else tuple(launch))


def spread_noise(args: Any, state: Any, model: Any) -> None:
    """Lets each process of a fresh run draw its own noise, for models that draw it (`lora_host`).

    Trainer seeds all processes alike, so that the pictures of one step would all have the noise and
    timesteps of the first process's. A resumed run gets the random states of each back.
    """
    if args.process_index and not state.global_step and hasattr(model, "lora_host"):
        own = torch.get_rng_state()[:8].clone()  # the seed; the state proper comes after it
        torch.manual_seed((torch.initial_seed() + args.process_index) % 2**63)
        # the state, not the seed: accelerate shuffles a later `train()` by torch.initial_seed()
        torch.set_rng_state(torch.cat([own, torch.get_rng_state()[8:]]))


def _launched(environ: Mapping[str, str], options: Sequence[str] | None) -> Iterator[Wish]:
    """Yields what `accelerate launch` was asked for: its options, then its config file."""
    if options is None:
        # its launcher of one process sets these only when it was asked for several
        if "MASTER_PORT" in environ and not any(name in environ for name in _SIZES):
            yield Wish("accelerate launch, which set MASTER_PORT", processes=SEVERAL)
        return
    given = option(options, "num_processes")
    if given.isdecimal() and int(given) > 0:
        yield Wish(f"accelerate launch --num_processes {given}", processes=int(given))
    for name, strategy in _OPTIONS.items():
        if any(_name(token) == name for token in options):
            version = option(options, "fsdp_version") if strategy == _FSDP else ""
            yield Wish(f"accelerate launch --{name}", strategy=strategy + version)
    config = _config(options)
    if config is None:
        return
    where = f"the config file of accelerate launch, {option(options, 'config_file') or 'default'}"
    count = getattr(config, "num_processes", 0) or 0
    if not given and isinstance(count, int) and count > 0:
        yield Wish(f"{where}: num_processes {count}", processes=count)
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if kind in _TYPES and not any(name in map(_name, options) for name in _OPTIONS):
        version = (getattr(config, "fsdp_config", None) or {}).get("fsdp_version", "")
        strategy = _TYPES[kind] + (str(version) if _TYPES[kind] == _FSDP else "")
        yield Wish(f"{where}: distributed_type {kind}", strategy=strategy)


def _config(options: Sequence[str]) -> Any:
    """Returns the config file that the launcher read; None where it read none, or it is gone."""
    from accelerate.commands.config import config_args

    named = option(options, "config_file") or None
    cpu = any(_name(token) == "cpu" for token in options)
    if named is None and (cpu or not os.path.isfile(config_args.default_config_file)):
        return None
    try:
        return config_args.load_config_from_file(named)
    except Exception:  # the launcher read it, so it was sound; what it said is not known any more
        return None


def option(options: Sequence[str], name: str) -> str:
    """Returns the value of a launcher's option; empty where it is not given."""
    for at, token in enumerate(options):
        if _name(token) == name:
            joined = token.partition("=")[2]
            return joined or (options[at + 1] if at + 1 < len(options) else "")
    return ""


def _name(token: str) -> str:
    """Returns the name of an option, which accelerate takes with hyphens or underscores."""
    if not token.startswith("--"):
        return ""
    return token[2:].partition("=")[0].replace("-", "_")


def launch_options(root: Path = Path("/proc")) -> tuple[str, ...] | None:
    """Finds the options of the `accelerate launch` that started this process.

    Args:
        root: Where the system shows its processes; Linux alone does.

    Returns:
        The options, without the script's own arguments; None where no launcher is found.
    """
    own, pid = _command(root, "self"), os.getppid()
    for _ in range(_GENERATIONS):
        command = _command(root, str(pid))
        options = launcher_options(command, own or [sys.executable, *sys.argv])
        if options is not None:
            return options
        pid = _parent(root, pid)
        if pid <= 1:
            break
    return None


def launcher_options(command: Sequence[str], own: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the options in a command line of `accelerate launch`; None if it is another one.

    Args:
        command: The command line of an ancestor.
        own: That of this process. What both end with is the script and its arguments.
    """
    for at in range(min(4, len(command))):
        here = (command[at].replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".exe"),)
        for launcher in _LAUNCHERS:
            if (*here, *command[at + 1 : at + len(launcher)]) == launcher:
                rest = list(command[at + len(launcher) :])
                tail = 0
                while tail < min(len(rest), len(own)) and rest[-1 - tail] == own[-1 - tail]:
                    tail += 1
                return tuple(rest[: len(rest) - tail])
    return None


def _command(root: Path, process: str) -> list[str]:
    try:
        text = (root / process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.removesuffix("\0").split("\0") if text else []


def _parent(root: Path, pid: int) -> int:
    try:
        # behind the name, which stands in brackets and may hold some: state, then the parent
        fields = (root / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, ValueError, IndexError):
        return 0


def _check_size(wish: Wish, found: Running) -> None:
    if not wish.processes or found.strategy == XLA:  # torch_xla counts the cores it finds
        return
    if found.processes == wish.processes or (wish.processes == SEVERAL and found.processes > 1):
        return
    several = wish.processes == SEVERAL
    asked = "several processes" if several else _counted(wish.processes)
    runs = "1 runs" if found.processes == 1 else f"{found.processes} run"
    raise TrainingError(
        f"{asked} {'was' if wish.processes == 1 else 'were'} asked for ({wish.where}) and {runs}",
        fix=_size_fix(wish, found),
    )


def _size_fix(wish: Wish, found: Running) -> str:
    if wish.processes == 1:
        return "Start the script with python, without a launcher, for one process."
    count = "N" if wish.processes == SEVERAL else wish.processes
    if found.processes == 1 and found.device == "cpu":
        return (
            f"Start it with torchrun --nproc_per_node {count} and TrainingArguments(use_cpu=True): "
            "accelerate launch --cpu starts one process whatever it is told, and without use_cpu "
            "each process of torchrun would train alone."
        )
    return (
        f"Start it with torchrun --nproc_per_node {count}, or ask for {found.processes} where you "
        "asked."
    )


def _counted(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _check_strategy(wish: Wish, found: Running) -> None:
    if not wish.strategy or found.strategy.startswith(wish.strategy):
        return
    runs = "one process runs" if found.processes == 1 else f"{found.strategy} runs"
    why, fix = "", f"Drop it, or start the run so that {wish.strategy} can run."
    if wish.strategy.startswith(_FSDP) and found.device == "cpu":
        why = ": accelerate shards on GPUs and their like, never on CPUs"
        fix = (
            "Leave it out for DDP. On CPUs load the model sharded and attach to that: "
            f"from_pretrained(..., distributed_config=DistributedConfig(fsdp_size="
            f"{found.processes if found.processes > 1 else 'N'}))."
        )
    raise TrainingError(
        f"{wish.strategy} was asked for ({wish.where}) and {runs}{why}",
        fix=fix,
    )
