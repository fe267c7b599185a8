"""`hf-lora`: thin commands over the library; results on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_lora import __version__
from hf_lora.cli.hub import add_hub_commands
from hf_lora.cli.words import add_command, name_of, path_of, put, put_json, takes_adapter
from hf_lora.errors import LoraError

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130  # argparse itself exits with 2 on bad usage

# Advice of the library, as an expression -> what one does here.
_ADVICE = (
    (r"\bextra_modules=True", "--extra-modules"),
    (r"\bstrict=False", "--no-strict"),
    (r'\btargets="([\w-]+)"', r"--targets \1"),
    (r"\btargets=\[\.\.\.\]", "--targets NAME,NAME"),
    (r"\bprint\(plan_lora\(model\)\)", "`hf-lora plan MODEL` to see the layers"),
    (r"\bfile='([^']+)'", r"--file '\1'"),
    (r"\bfile=\.\.\.", "--file FOLDER"),
    (r"\bload the base in (bfloat16|float32)", r"merge with --dtype \1"),
    (r": (open|save)_adapter\(.*host=[^)]*\)", ": --for PIPELINE"),
    (r"\bOpen it with open_adapter\(source, host=\.\.\.\)", "Give --for PIPELINE"),
    (r"\bUse config=LoraConfig", "In Python, use config=LoraConfig"),
    (r"\bPass limits=(\S+) if you trust it", r"In Python, limits=\1 lifts this if you trust it"),
    (r"\bpass limits=(\S+) if you trust it", r"in Python, limits=\1 lifts this if you trust it"),
    (
        r'A Hub repository is read by load_lora\(host, "user/name"\)',
        "Give a path that exists or a repository id like 'user/name'",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 when it worked, 1 on a `LoraError` (its message is on stderr), 130 on Ctrl-C. Bad usage
        exits with 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser(words[:1]).parse_args(words)
    try:
        args.run(args)
    except LoraError as error:
        error.fix = _advice(error.fix, args)
        sys.stderr.write(f"hf-lora: {type(error).__name__}: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("hf-lora: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of `hf-lora plan ... | head` has gone
        sys.stderr.close()
    return EXIT_OK


def _advice(text: str, args: argparse.Namespace) -> str:
    """Returns a text of the library with options in the place of Python arguments."""
    for python, option in _ADVICE:
        text = re.sub(python, option, text)
    if not hasattr(args, "host"):  # the command has no --for, and probe has
        probe = f"`hf-lora probe {getattr(args, 'adapter', 'ADAPTER')} --for PIPELINE` reads it"
        asked = r"Give --for PIPELINE|Give the pipeline.*: --for PIPELINE"
        text = re.sub(asked, lambda _: probe, text)  # a path may have backslashes
    return text


def _parser(first: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-lora", description="LoRA adapters for Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"hf-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = add_command(commands, "demo", _demo, "train a LoRA on a real language model, offline")
    demo.add_argument("--out", type=path_of, default=Path("hf-lora-demo"), help="where results go")
    demo.add_argument("--seed", type=int, default=0, help="seed of data order and init")
    demo.add_argument("--push", metavar="REPO", help="also push the adapter to the real Hub")
    demo.add_argument(
        "--styles", type=path_of, metavar="FOLDER", help="examples/emoji: also draw its real styles"
    )

    plan = add_command(commands, "plan", _plan, "show which layers of a model would get a LoRA")
    plan.add_argument(
        "model", metavar="MODEL", type=name_of, help="folder, config.json or repository id"
    )
    plan.add_argument("--rank", type=int, default=16)
    plan.add_argument("--alpha", type=float, default=None)
    plan.add_argument(
        "--targets", default="default", help="preset, or roles and names separated by commas"
    )
    plan.add_argument("--revision", type=name_of, help="branch, tag or commit of a repository")

    train = add_command(
        commands, "train", _train, "train a LoRA on files of examples, or on pictures"
    )
    if first == ["train"]:  # its table of flags lies in a room that loads torch
        from hf_lora.training.recipe import add_flags

        add_flags(train)

    inspect = add_command(commands, "inspect", _inspect, "show what an adapter holds")
    takes_adapter(inspect)

    _add_exchange_commands(commands)
    _add_base_commands(commands)
    add_hub_commands(commands)
    return parser


def _add_exchange_commands(commands: Any) -> None:
    """Adds the commands on files of other programs."""
    probe = add_command(commands, "probe", _probe, "show what a file is and whether it would load")
    takes_adapter(probe)
    probe.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="content with a file of which the pipeline lacks parts",
    )

    convert = add_command(commands, "convert", _convert, "write a file as another program has it")
    takes_adapter(convert)
    convert.add_argument("out", metavar="OUT", type=path_of, help="file or folder to write")
    convert.add_argument(
        "--to",
        required=True,
        dest="layout",
        choices=("diffusers", "peft", "kohya", "comfyui"),
        help="whose spelling",
    )
    for command in (probe, convert):
        command.add_argument(
            "--for",
            dest="host",
            metavar="PIPELINE",
            type=name_of,
            help="public pipeline such as sdxl, or folder or repository id; no weights are read",
        )


def _add_base_commands(commands: Any) -> None:
    """Adds the commands that take a base beside an adapter."""
    base: dict[str, Any] = {
        "metavar": "MODEL",
        "type": name_of,
        "help": "folder or repository id of the base",
    }
    verify = add_command(
        commands, "verify", _verify, "check an adapter, and whether it fits a base"
    )
    takes_adapter(verify)
    verify.add_argument("--base", **base)

    merge = add_command(commands, "merge", _merge, "write a base with an adapter in its weights")
    merge.add_argument("base", **base)
    takes_adapter(merge)
    merge.add_argument("out", metavar="OUT", type=path_of, help="folder to write, new or empty")
    merge.add_argument("--scale", type=float, default=1.0, help="strength, 1.0 as trained")
    merge.add_argument("--dtype", default="auto", help="dtype of the result, such as bfloat16")
    merge.add_argument(
        "--extra-modules",
        action="store_true",
        help="take modules of the adapter that replace pretrained ones, such as lm_head",
    )
    merge.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="leave out what the base lacks, and take another base than the adapter's",
    )
    for command in (verify, merge):
        command.add_argument(
            "--base-revision", type=name_of, help="branch, tag or commit of the base's repository"
        )


def _demo(args: argparse.Namespace) -> None:
    from hf_lora import demo, demo_styles

    log: Callable[[str], None] = (lambda _: None) if args.json else put
    if args.styles is not None:
        demo_styles.check(args.styles)  # now, not after minutes of training
    result = demo.run(args.out, seed=args.seed, push=args.push or "", log=log)
    if args.styles is not None:
        result["styles"] = demo_styles.run(args.styles, args.out, log)
    if args.json:
        put_json(result)


def _train(args: argparse.Namespace) -> None:
    from hf_lora.training.recipe import FIELDS
    from hf_lora.training.recipe.preview import dry_run
    from hf_lora.training.recipe.ready import gather
    from hf_lora.training.recipe.run import train

    _quiet_libraries()
    told = {n: v for n, v in vars(args).items() if n in FIELDS or n == "config"}
    recipe = gather(told)
    log: Callable[[str], None] = (lambda _: None) if args.json else put
    result = dry_run(recipe) if recipe.dry_run else train(recipe, log)
    lines = result.pop("lines", None)
    if lines is None:  # of several processes, the first one speaks
        return
    if args.json:
        put_json(result)
    else:
        put("\n".join(lines))


def _plan(args: argparse.Namespace) -> None:
    import transformers

    from hf_lora.plan import plan_lora
    from hf_lora.skeletons import laid_out_model

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    listed = [name.strip() for name in args.targets.split(",")]
    plan = plan_lora(
        laid_out_model(args.model, revision=args.revision),
        rank=args.rank,
        alpha=args.alpha,
        targets=listed if len(listed) > 1 else listed[0],
    )
    if args.json:
        put_json(plan.to_dict())
    else:
        put(str(plan))


def _files(args: argparse.Namespace) -> Path:
    """Returns where the adapter's files lie here, all of one commit."""
    from hf_lora.fetch import local_files

    return local_files(args.adapter, file=args.file, revision=args.revision)


def _inspect(args: argparse.Namespace) -> None:
    from hf_lora.formats import read_header

    facts = read_header(_files(args)).info
    if args.json:
        put_json(facts)
        return
    for key, value in facts.items():
        if key != "components":
            put(f"{_words(key):<17} {_shown(value)}")
    for name, part in facts["components"].items():
        put(f"{name}:")
        for key, value in part.items():
            put(f"  {_words(key):<15} {_shown(value, by_targets=key == 'rank')}")


def _probe(args: argparse.Namespace) -> None:
    from hf_lora.errors import AdapterMismatch
    from hf_lora.probe import probe_lora

    _quiet_libraries()
    report = probe_lora(_files(args), args.host)
    report = dataclasses.replace(report, fix=_advice(report.fix, args))
    if args.json:
        put_json(report.as_dict())
    else:
        put(str(report))
    if not (report.ok or (report.lenient and not args.strict)):
        raise AdapterMismatch(f"{args.adapter}: {report.reason}", fix=report.fix)


def _convert(args: argparse.Namespace) -> None:
    from hf_lora.convert import convert

    _quiet_libraries()
    done = convert(
        args.adapter,
        args.out,
        args.layout,
        host=args.host,
        file=args.file,
        revision=args.revision,
    )
    if args.json:
        put_json(done.as_dict())
    else:
        put(str(done))


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: object, *, by_targets: bool = False) -> str:
    if isinstance(value, dict):
        form = "{} ({} targets)" if by_targets else "{} {}"
        value = ", ".join(form.format(k, v) for k, v in value.items())
    elif isinstance(value, list):
        value = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)
    return "-" if value in (None, "") else str(value)


def _verify(args: argparse.Namespace) -> None:
    from hf_lora.errors import BadAdapterFile
    from hf_lora.verify import verify

    files = _files(args)
    base = None if args.base is None else _base_for(args, files)
    rows = [
        dataclasses.replace(row, text=_advice(row.text, args)) for row in verify(files, base=base)
    ]
    if args.json:
        put_json([dataclasses.asdict(row) for row in rows])
    else:
        for row in rows:
            put(f"{row.state:<7} {row.name:<9} {row.text}")
    failed = [row.name for row in rows if row.state == "failed"]
    if failed:
        raise BadAdapterFile(f"{args.adapter}: the check {failed[0]!r} failed")


def _base_for(args: argparse.Namespace, files: Path) -> Any:
    from hf_lora.formats import read_header
    from hf_lora.verify import load_base

    _quiet_libraries()
    return load_base(args.base, read_header(files), revision=args.base_revision)


def _merge(args: argparse.Namespace) -> None:
    from hf_lora.bake import merge_files

    _quiet_libraries()
    facts = merge_files(
        args.base,
        _files(args),
        args.out,
        scale=args.scale,
        dtype=args.dtype,
        revision=args.base_revision,
        strict=args.strict,
        extra_modules=args.extra_modules,
    )
    if args.json:
        put_json(facts)
        return
    for line in facts["lines"]:
        put(line)


def _quiet_libraries() -> None:
    """Results go to stdout, and stderr is for what concerns the user: no tables of missing keys."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for log in (of_diffusers, of_transformers):
        log.set_verbosity_error()
        log.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
