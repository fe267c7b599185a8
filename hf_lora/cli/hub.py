"""The commands on the Hub and on what lies here of it: push, pull, card, ls, register."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hf_lora.cli.words import add_command, name_of, path_of, put, put_json, size_of, takes_adapter


def add_hub_commands(commands: Any) -> None:
    """Adds the commands."""
    push = add_command(commands, "push", _push, "publish an adapter with its model card")
    takes_adapter(push)
    push.add_argument("repo", metavar="REPO", type=name_of, help="repository, user/name")
    push.add_argument("--branch", type=name_of, help="branch to push to, made from main")
    push.add_argument("--private", action="store_true", help="if the repository is made now")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--tag", type=name_of, help="tag the commit")
    push.add_argument("--message", type=name_of, help="first line of the commit")
    _takes_card(push)

    pull = add_command(commands, "pull", _pull, "download an adapter and check it whole")
    takes_adapter(pull)
    pull.add_argument("--out", metavar="OUT", type=path_of, help="also write it there")

    card = add_command(commands, "card", _card, "print the model card that a push would write")
    takes_adapter(card)
    card.add_argument("--repo", type=name_of, help="repository, user/name")
    _takes_card(card)

    shelf = add_command(commands, "ls", _ls, "list adapters in the Hub's cache or below a folder")
    shelf.add_argument("folder", metavar="FOLDER", nargs="?", type=path_of)

    register = add_command(commands, "register", _register, "make `hf lora ...` run this hf-lora")
    register.add_argument("--command", type=path_of, help="program to run instead")
    add_command(commands, "unregister", _unregister, "take `hf lora ...` away again")


def _takes_card(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base-model", type=name_of, help="Hub id of the base")
    command.add_argument("--license", type=name_of, help="such as apache-2.0")
    command.add_argument("--language", type=name_of, help="codes, with commas between")
    command.add_argument("--instance-prompt", type=name_of, help="calls the style up")
    command.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE=PROMPT",
        help="a picture for the card; may be given several times",
    )


def _extras(args: argparse.Namespace) -> Any:
    from hf_lora.hub import CardExtras

    return CardExtras(
        repo_id=args.repo or "",
        base_model=args.base_model or "",
        license=args.license or "",
        language=[code for code in (args.language or "").split(",") if code],
        instance_prompt=args.instance_prompt or "",
    )


def _images(args: argparse.Namespace) -> dict[str | os.PathLike[str], str]:
    pairs = (text.partition("=") for text in args.image)
    return {file: prompt for file, _, prompt in pairs}


def _adapter(args: argparse.Namespace) -> Any:
    from hf_lora.exchange import finder
    from hf_lora.fetch import local_files
    from hf_lora.formats import read_adapter

    found = local_files(args.adapter, file=args.file, revision=args.revision)
    return read_adapter(found, names_of=finder(None))


def _push(args: argparse.Namespace) -> None:
    from hf_lora.hub import push_lora

    adapter = _adapter(args)
    size = sum(t.nbytes for part in adapter.components.values() for _, t in part.tensors())
    if not args.json:
        put(f"Pushing {adapter.source or args.adapter}, {size_of(size)}, to {args.repo}")
    commit = push_lora(
        adapter,
        args.repo,
        revision=args.branch,
        private=True if args.private else None,
        create_pr=args.create_pr,
        tag=args.tag,
        message=args.message,
        base_model=args.base_model or "",
        card=_extras(args),
        images=_images(args),
    )
    if args.json:
        facts = {"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
        put_json({"repo": args.repo, **facts})
    else:
        put(f"{commit.pr_url or commit.commit_url}")


def _pull(args: argparse.Namespace) -> None:
    from hf_lora.exchange import save_adapter

    adapter = _adapter(args)
    written = None if args.out is None else save_adapter(adapter, args.out)
    facts = {
        "path": str(written or adapter.source),
        "digest": adapter.digest,
        "base": adapter.info["base"],
    }
    if args.json:
        put_json(facts)
        return
    for key, value in facts.items():
        put(f"{key:<7} {value or '-'}")


def _card(args: argparse.Namespace) -> None:
    from hf_lora.hub.card import card_of

    text = card_of(_adapter(args), _extras(args)).text
    if args.json:
        put_json({"text": text})
    else:
        put(text.rstrip("\n"))


def _ls(args: argparse.Namespace) -> None:
    from hf_lora.hub.shelf import adapters_below, adapters_in_cache

    rows = adapters_in_cache() if args.folder is None else adapters_below(args.folder)
    if args.json:
        put_json([row.to_dict() for row in rows])
        return
    if not rows:
        put(f"No adapters in {'the cache' if args.folder is None else args.folder}.")
    for row in rows:
        where = " ".join((row.repo_id, *(r[:12] for r in row.revision))) or row.path
        kinds = ", ".join(f"{part} {kind}" for part, kind in row.kinds)
        put(where)
        if row.repo_id:
            put(f"  path    {row.path}")
        put(f"  holds   {row.problem or f'{kinds}; {size_of(row.size)}'}")
        put(f"  base    {row.base or '-'}")
        put(f"  digest  {row.digest or '-'}")


def _register(args: argparse.Namespace) -> None:
    from hf_lora.hub.extension import register

    manifest = register(args.command)
    if args.json:
        put_json({"manifest": str(manifest)})
    else:
        put(f"`hf lora ...` runs from now on; {manifest}")


def _unregister(args: argparse.Namespace) -> None:
    from hf_lora.hub.extension import unregister

    was_there = unregister()
    if args.json:
        put_json({"removed": was_there})
    else:
        put("`hf lora` is gone." if was_there else "`hf lora` was not registered.")
