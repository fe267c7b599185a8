"""Bad files, headers, manifests and names: see `tests/test_hostile.py` for what a row means."""

import base64
import json
import math
import os

import torch

from hf_lora import LoadLimits
from hf_lora.errors import (
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
    MergeError,
)
from hf_lora.manifest import KEY
from tests.damage import (
    CONFIG,
    GONE,
    WEIGHTS,
    Row,
    both,
    config,
    config_text,
    container,
    cut,
    drop,
    edit,
    entry,
    given,
    header,
    header_only,
    loop,
    manifest,
    manifest_config,
    metadata,
    move,
    out_of_folder,
    patch,
    put,
    raw_header,
    replace,
    respell,
    signed,
    tensors,
    void,
    write,
    write_raw,
)
from tests.hostile_models import LAYER, A, B

Bad, Mis, Not, Opt = BadAdapterFile, AdapterMismatch, AdapterNotFound, InvalidOption


def link(name, target):
    return replace(name, lambda path: os.symlink(target, path))


def long_number(folder):
    config(r=11111)(folder)
    config_text("11111", "1" * 5000)(folder)


CRYPTIC = (
    Row(
        "a rank in quotes",
        "2.cryptic: r='4'",
        config(r="16"),
        Bad,
        r"adapter_config.json: r is '16', not a positive whole number",
    ),
    Row("half a rank", "2.cryptic: r=4.5", config(r=4.5), Bad, r"r is 4\.5, not a positive whole"),
    Row("a rank that is true", "2.cryptic: r=4.5", config(r=True), Bad, "r is True, not a positi"),
    Row(
        "half a rank for one target",
        "2.cryptic: r=4.5",
        config(rank_pattern={"q_proj": 15.5}),
        Bad,
        r"rank_pattern\['q_proj'\] is 15\.5, not a positive whole number",
    ),
    Row(
        "no value for alpha",
        "2.cryptic: alpha null / '8'",
        config(lora_alpha=None),
        Bad,
        "adapter_config.json: lora_alpha is None, not a finite number",
    ),
    Row(
        "an alpha in quotes",
        "2.cryptic: alpha null / '8'",
        config(lora_alpha="8"),
        Bad,
        "lora_alpha is '8', not a finite number",
    ),
    Row(
        "an alpha in quotes for one target",
        "2.cryptic: alpha null / '8'",
        config(alpha_pattern={"q_proj": "8"}),
        Bad,
        r"alpha_pattern\['q_proj'\] is '8', not a finite number",
    ),
    Row(
        "alphas that are a list",
        "own: alpha_pattern of another type",
        config(alpha_pattern=["q_proj"]),
        Bad,
        "alpha_pattern is list, not an object",
    ),
    Row(
        "alphas of LoHa that are a list",
        "own: alpha_pattern of another type",
        config(alpha_pattern=["q_proj"]),
        Bad,
        "alpha_pattern is list, not an object",
        file="loha",
    ),
    Row(
        "a number for the targets",
        "2.cryptic: target_modules int",
        config(target_modules=5),
        Bad,
        "target_modules is 5, not a list of names",
    ),
    Row(
        "an object for the targets",
        "2.cryptic: target_modules int",
        config(target_modules={"q_proj": 1}),
        Bad,
        "target_modules is .*, not a list of names",
    ),
    Row(
        "numbers among the targets",
        "2.cryptic: target_modules int",
        config(target_modules=["q_proj", 5]),
        Bad,
        "target_modules has the entry 5",
    ),
    Row(
        "a config that is a list",
        "2.cryptic: config list",
        write(CONFIG, b"[1]"),
        Bad,
        "adapter_config.json: the config is no JSON object",
    ),
    Row(
        "a config that is null",
        "2.cryptic: config null",
        write(CONFIG, b"null"),
        Bad,
        "adapter_config.json: the config is no JSON object",
    ),
    Row(
        "an empty config",
        "2.cryptic: config empty / BOM / non-UTF8 / /etc/passwd symlink",
        write(CONFIG, b""),
        Bad,
        "adapter_config.json: it is no valid JSON",
    ),
    Row(
        "a config with a byte order mark",
        "2.cryptic: config empty / BOM / non-UTF8 / /etc/passwd symlink",
        patch(CONFIG, lambda data: b"\xef\xbb\xbf" + data),
        Bad,
        "adapter_config.json: it is no valid JSON .*BOM",
    ),
    Row(
        "a config in UTF-16",
        "2.cryptic: config empty / BOM / non-UTF8 / /etc/passwd symlink",
        patch(CONFIG, lambda data: data.decode().encode("utf-16")),
        Bad,
        "adapter_config.json: it is no valid JSON .*utf-8",
    ),
    Row(
        "a config that is a link to the users of the machine",
        "2.cryptic: /etc/passwd symlink",
        link(CONFIG, "/etc/passwd"),
        Bad,
        "adapter_config.json is a link that leads out of its folder.*Copy the file",
    ),
    Row(
        "such a link beside our own file",
        "2.cryptic: /etc/passwd symlink",
        link(CONFIG, "/etc/passwd"),
        Bad,
        "adapter_config.json is a link that leads out of its folder",
        file="ours",
    ),
    Row(
        "a number of five thousand digits",
        "2.cryptic: 5000-digit int",
        long_number,
        Bad,
        "adapter_config.json: it is no valid JSON .*Exceeds the limit",
    ),
    Row(
        "a number of four hundred digits",
        "2.cryptic: 5000-digit int",
        config(lora_alpha=10**400),
        Bad,
        "lora_alpha is 1000.*not a finite number",
    ),
    Row(
        "an unknown kind of adapter",
        "2.cryptic: unknown peft_type",
        config(peft_type="SUPERLORA"),
        Bad,
        "peft_type is 'SUPERLORA'.*Types that are read: LORA, ADALORA, LOHA",
    ),
    Row(
        "a kind of adapter that is a list",
        "2.cryptic: unknown peft_type",
        config(peft_type=["LORA"]),
        Bad,
        r"peft_type is \['LORA'\]",
    ),
    Row(
        "prompts instead of factors",
        "2.cryptic: unknown peft_type",
        config(peft_type="PROMPT_TUNING"),
        Bad,
        "peft_type is 'PROMPT_TUNING'",
    ),
    Row(
        "no kind of adapter",
        "2.cryptic: peft_type missing (KeyError)",
        config(peft_type=GONE),
        Bad,
        "peft_type is None",
    ),
    Row(
        "no kind of adapter in the copy beside our own file",
        "2.cryptic: peft_type missing (KeyError)",
        config(peft_type=GONE),
        None,
        "repaired: adapter_config.json is broken .peft_type is None",
        file="ours",
    ),
    Row(
        "a folder in place of the weights",
        "2.cryptic: weights is a directory",
        replace(WEIGHTS, os.mkdir),
        Bad,
        "adapter_model.safetensors: it is no regular file",
    ),
    Row(
        "a folder in place of the config",
        "own: config is a directory",
        replace(CONFIG, os.mkdir),
        Bad,
        "adapter_config.json: it is no regular file",
    ),
    Row(
        "weights that link to themselves",
        "2.cryptic: weights symlink loop",
        replace(WEIGHTS, loop),
        Bad,
        "'adapter_model.safetensors' is no file or a link that leads nowhere",
    ),
    Row(
        "a config that links to itself",
        "2.cryptic: weights symlink loop",
        replace(CONFIG, loop),
        Bad,
        "'adapter_config.json' is no file or a link that leads nowhere",
    ),
    Row(
        "weights that link to nothing",
        "own: a dangling link",
        link(WEIGHTS, "gone"),
        Not,
        "there is no file adapter_model.safetensors",
    ),
    Row(
        "factors of B only",
        "2.cryptic: only lora_B",
        tensors(lambda t: {k: v for k, v in t.items() if "lora_B" in k}),
        Mis,
        "has lora_B but no lora_A",
    ),
    Row(
        "an adapter without a name",
        "2.cryptic: adapter name '' or 'a.b'",
        given(name=""),
        Opt,
        "adapter name '' is not 1 to 64 letters",
    ),
    Row(
        "an adapter with a dot in its name",
        "2.cryptic: adapter name '' or 'a.b'",
        given(name="a.b"),
        Opt,
        "adapter name 'a.b' is not 1 to 64 letters",
    ),
    Row(
        "an adapter of which the name is a number",
        "2.cryptic: adapter name '' or 'a.b'",
        given(name=5),
        Opt,
        "adapter name 5 is not 1 to 64 letters",
    ),
    Row(
        "weights without their last byte",
        "2.cryptic: Truncated",
        cut(-1),
        Bad,
        "no whole safetensors file: its tensors end at .*Download or save it again",
    ),
    Row(
        "weights cut in the header",
        "2.cryptic: Truncated",
        cut(100),
        Bad,
        r"no whole safetensors file: 100 bytes, header of \d+",
    ),
    Row(
        "weights cut in the header of our own file",
        "2.cryptic: Truncated",
        cut(-2000),
        Bad,
        "no whole safetensors file",
        file="ours",
    ),
    Row(
        "a header that is no JSON",
        "2.cryptic: bad header",
        header_only(b"{'a': 1}"),
        Bad,
        "the header is no valid JSON",
    ),
    Row(
        "a header that is a list",
        "2.cryptic: bad header",
        header_only(b"[]"),
        Bad,
        "its header is no JSON object",
    ),
    Row(
        "a header entry that is a number",
        "2.cryptic: bad header",
        header(lambda h: h.update({A: 5})),
        Bad,
        "the header entry of .*q_proj.lora_A.weight' is malformed",
    ),
    Row(
        "empty weights",
        "2.cryptic: empty file",
        write(WEIGHTS, b""),
        Bad,
        "no whole safetensors file: 0 bytes",
    ),
    Row(
        "weights of five bytes",
        "2.cryptic: empty file",
        write(WEIGHTS, b"\0\0\0\0\0"),
        Bad,
        "no whole safetensors file: 5 bytes",
    ),
    Row(
        "weights that are a header of no bytes",
        "2.cryptic: empty file",
        write(WEIGHTS, bytes(8)),
        Bad,
        "the header is no valid JSON",
    ),
    Row(
        "tensors that overlap",
        "2.cryptic: overlaps",
        header(lambda h: h[A].update(data_offsets=h[B]["data_offsets"], shape=h[B]["shape"])),
        Bad,
        "no whole safetensors file: .* stands at",
    ),
    Row(
        "an archive behind the tensors",
        "2.cryptic: polyglot",
        container(lambda h, data: (h, data + b"PK\x05\x06" + bytes(18))),
        Bad,
        "no whole safetensors file: its tensors end at",
    ),
    Row(
        "an archive behind the tensors of our own file",
        "2.cryptic: polyglot",
        container(lambda h, data: (h, data + b"PK\x05\x06" + bytes(18))),
        Bad,
        "no whole safetensors file: its tensors end at",
        file="ours",
    ),
    Row(
        "text between the header and the tensors",
        "2.cryptic: polyglot",
        container(lambda h, data: (h, b"#!/bin/sh\n" + data)),
        Bad,
        "no whole safetensors file",
    ),
    Row(
        "a shape of which the product overflows",
        "2.cryptic: shape overflow",
        entry(A, shape=[2**33, 2**33]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "a dimension of 2^63",
        "2.cryptic: shape overflow",
        entry(A, shape=[2**63, 1]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "no values in dimensions that overflow",
        "2.cryptic: shape overflow",
        entry(A, shape=[0, 2**52, 2**52], data_offsets=[0, 0]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "a negative dimension",
        "own: negative dimensions",
        entry(A, shape=[-16, -32]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "a dimension that is half a number",
        "own: dimensions that are none",
        entry(A, shape=[16.5, 32]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "a dimension that is true",
        "own: dimensions that are none",
        entry(A, shape=[16, 32, True]),
        Bad,
        "q_proj.lora_A.weight has sizes that are none",
    ),
    Row(
        "more dimensions than a tensor has",
        "own: dimensions that are none",
        entry(A, shape=[16, 32] + [1] * 100),
        Bad,
        "q_proj.lora_A.weight' is malformed",
    ),
    Row(
        "offsets that run backwards",
        "own: offsets that are none",
        header(lambda h: h[A].update(data_offsets=h[A]["data_offsets"][::-1])),
        Bad,
        "no whole safetensors file",
    ),
    Row(
        "three offsets",
        "own: offsets that are none",
        entry(A, data_offsets=[0, 1, 2]),
        Bad,
        "q_proj.lora_A.weight' is malformed",
    ),
    Row(
        "no shape",
        "own: a header entry without its fields",
        header(lambda h: void(h[A].pop("shape"))),
        Bad,
        "q_proj.lora_A.weight' is malformed",
    ),
    Row(
        "a factor of no dimension",
        "own: a factor of no dimension",
        tensors(lambda t: t.update({A: torch.tensor(1.0)})),
        Bad,
        r"q_proj.lora_A holds float32 values of shape \(\)",
    ),
    Row(
        "factors of rank nothing",
        "own: zero-size tensors",
        tensors(lambda t: t.update({A: torch.zeros(0, 32), B: torch.zeros(32, 0)})),
        Mis,
        "rank 0 in file",
    ),
    Row(
        "factors of rank nothing for parameters",
        "own: zero-size tensors",
        both(
            config(target_parameters=["q_proj.weight"]),
            tensors(lambda t: t.update({A: torch.zeros(0, 32), B: torch.zeros(32, 0)})),
        ),
        Mis,
        "rank 0 in file",
    ),
    Row(
        "factors of no features",
        "own: zero-size tensors",
        tensors(lambda t: t.update({A: torch.zeros(16, 0)})),
        Mis,
        r"another size: .*q_proj.lora_A is \(16, 0\)",
    ),
)

CLEAR = (
    Row("a rank of nothing", "2.clear: r<=0", config(r=0), Bad, "r is 0, not a positive whole"),
    Row("a rank below nothing", "2.clear: r<=0", config(r=-4), Bad, "r is -4, not a positive wh"),
    Row(
        "a rank of nothing for one target",
        "2.clear: r<=0",
        config(rank_pattern={"q_proj": 0}),
        Bad,
        r"rank_pattern\['q_proj'\] is 0, not a positive whole number",
    ),
    Row(
        "a dropout of seven",
        "2.clear: dropout 7",
        config(lora_dropout=7),
        Bad,
        "lora_dropout is 7, not a number from 0 to 1",
    ),
    Row(
        "a dropout in quotes",
        "2.clear: dropout 7",
        config(lora_dropout="0.1"),
        Bad,
        "lora_dropout is '0.1', not a number from 0 to 1",
    ),
    Row(
        "a dropout of seven beside our own file",
        "2.clear: dropout 7",
        config(lora_dropout=7),
        Bad,
        "lora_dropout is 7, not a number from 0 to 1",
        file="ours",
    ),
    Row(
        "a task that is none",
        "2.clear: task_type bogus",
        config(task_type="BOGUS"),
        Bad,
        "does not make a LoraConfig: Invalid task type",
    ),
    Row(
        "a task that is a list",
        "2.clear: task_type bogus",
        config(task_type=["CAUSAL_LM"]),
        Bad,
        "does not make a LoraConfig: Invalid task type",
    ),
    Row(
        "an adapter of another family",
        "2.clear: GPT2 (no matching target)",
        given(),
        Mis,
        "another architecture: 4 of its 4 targets are no modules of GPT2LMHeadModel",
        host="gpt2",
    ),
    Row(
        "an adapter of another family in our own file",
        "2.clear: GPT2 (no matching target)",
        given(),
        Mis,
        "another architecture: 4 of its 4 targets are no modules of GPT2LMHeadModel",
        file="ours",
        host="gpt2",
    ),
    Row(
        "nothing of the file fits, strict or not",
        "2.clear: GPT2 (no matching target)",
        given(strict=False),
        Mis,
        "another architecture",
        host="gpt2",
    ),
    Row(
        "a host of another hidden size",
        "2.clear: wrong hidden size",
        given(),
        Mis,
        r"another size: .*lora_A is \(16, 32\) in the file, \(16, 64\) on LlamaForCausalLM",
        host="wide",
    ),
    Row(
        "a host of another hidden size for our own file",
        "2.clear: wrong hidden size",
        given(),
        Mis,
        "another (size|base)",
        file="ours",
        host="wide",
    ),
    Row(
        "transposed factors",
        "2.clear: transposed shapes",
        tensors(lambda t: t.update({k: v.T.contiguous() for k, v in t.items()})),
        Mis,
        "disagree on the rank|rank 32 in file",
    ),
    Row(
        "one factor transposed",
        "2.clear: transposed shapes",
        edit(A, lambda t: t.T.contiguous()),
        Mis,
        "q_proj A .32, 16. and B .32, 16. disagree on the rank",
    ),
    Row(
        "a factor of five dimensions",
        "2.clear: transposed shapes",
        edit(A, lambda t: t[:, :, None, None, None].contiguous()),
        Mis,
        r"another size: .*lora_A is \(16, 32, 1, 1, 1\)",
    ),
    Row(
        "another rank in the config",
        "2.clear: r mismatch",
        config(r=8),
        Mis,
        "rank 16 in file, 8 in config, at .*self_attn",
    ),
    Row(
        "another rank in the config beside our own file",
        "2.clear: r mismatch",
        config(r=8),
        None,
        "repaired: r is 8 in adapter_config.json, but 16 in the header, which holds",
        file="ours",
    ),
    Row(
        "another rank in one layer",
        "2.clear: r mismatch",
        tensors(lambda t: t.update({A: t[A][:8].clone(), B: t[B][:, :8].clone()})),
        Mis,
        "rank 8 in file, 16 in config, at model.layers.1.self_attn.q_proj",
    ),
    Row(
        "LoHa weights under the config of LoRA",
        "own: LoHa weights under the config of LoRA",
        config(peft_type="LORA", lora_alpha=4),
        Bad,
        "neither LORA factors",
        file="loha",
    ),
    Row(
        "no config",
        "2.clear: config missing",
        drop(CONFIG),
        Not,
        "there is no adapter_config.json in",
    ),
    Row(
        "no config beside our own file",
        "2.clear: config missing",
        drop(CONFIG),
        None,
        "repaired: adapter_config.json is missing; the header of adapter_model.safetensors holds",
        file="ours",
    ),
    Row(
        "factors in a file of another name, without config",
        "2.clear: config missing",
        given(move(WEIGHTS, "style.safetensors"), file="style.safetensors"),
        Not,
        "the file holds peft factors but no config, so alpha is not known.*Give the folder",
    ),
)


def elsewhere(folder):
    """Moves the adapter away and leaves a link to its folder."""
    away = folder.parent / "away"
    away.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(away / name)
    os.symlink(away, folder / "inner")


def hub_cache(folder):
    """Lays the folder out as the Hub's cache does: links from a snapshot to the blobs beside it."""
    root = folder / "models--a--b"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (folder / name).rename(blobs / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / name)


def false_cache(folder):
    """As `hub_cache`, but the weights lead out of the blobs."""
    hub_cache(folder)
    root = folder / "models--a--b"
    (root / "blobs" / "1").rename(folder / "1")
    name = root / "snapshots" / "abc" / WEIGHTS
    name.unlink()
    os.symlink("../../../1", name)


SNAPSHOT = "models--a--b/snapshots/abc"

PLACES = (
    Row(
        "weights that link out of the folder",
        "2.accepted: symlinked weights pointing out of the folder: followed",
        out_of_folder(WEIGHTS),
        Bad,
        "adapter_model.safetensors is a link that leads out of its folder.*Copy the file itself",
    ),
    Row(
        "our own weights that link out of the folder",
        "2.accepted: symlinked weights pointing out of the folder: followed",
        out_of_folder(WEIGHTS),
        Bad,
        "adapter_model.safetensors is a link that leads out of its folder",
        file="ours",
    ),
    Row(
        "weights of another name that link out of the folder",
        "2.accepted: symlinked weights pointing out of the folder: followed",
        both(out_of_folder(WEIGHTS), move(WEIGHTS, "style.safetensors")),
        Bad,
        "style.safetensors is a link that leads out of its folder",
    ),
    Row(
        "links of the Hub's cache",
        "own: links from a snapshot to its blobs are right",
        given(hub_cache, file=SNAPSHOT),
        None,
        "4 targets",
    ),
    Row(
        "links of a false cache that lead out of its blobs",
        "own: links from a snapshot to another place",
        given(false_cache, file=SNAPSHOT),
        Bad,
        "adapter_model.safetensors is a link that leads out of its folder",
    ),
    Row(
        "a link inside the folder",
        "own: a link inside the folder is right",
        both(move(WEIGHTS, "data"), lambda f: os.symlink("data", f / WEIGHTS)),
        None,
        "4 targets",
    ),
    Row(
        "a subfolder that is above",
        '2.accepted: subfolder="../good" followed',
        given(file="../good"),
        Opt,
        "file='../good' leads out of",
    ),
    Row(
        "a subfolder that is above, by a detour",
        '2.accepted: subfolder="../good" followed',
        given(file="inner/../../good"),
        Opt,
        "file='inner/../../good' leads out of",
    ),
    Row(
        "a subfolder that is a link out of the folder",
        '2.accepted: subfolder="../good" followed',
        given(elsewhere, file="inner"),
        Bad,
        "inner is a link that leads out of its folder",
    ),
    Row(
        "an adapter of which the name is a path",
        "2.accepted: Adapter name 'a/b' saves into nested dirs",
        given(name="a/b"),
        Opt,
        "adapter name 'a/b' is not 1 to 64 letters",
    ),
    Row(
        "an adapter of which the name leads up",
        "2.accepted: Adapter name 'a/b' saves into nested dirs",
        given(name=".."),
        Opt,
        r"adapter name '\.\.' is not 1 to 64 letters",
    ),
    Row(
        "an absolute file",
        "1.systems: one validator for `..`, absolute, drive, UNC under both OS rules",
        given(file="/etc/passwd"),
        Opt,
        "file='/etc/passwd' leads out of",
    ),
    Row(
        "a file above, as Windows spells it",
        "1.systems: one validator for `..`, absolute, drive, UNC under both OS rules",
        given(file="..\\good"),
        Opt,
        "leads out of",
    ),
    Row(
        "a file on another drive or machine",
        "1.systems: one validator for `..`, absolute, drive, UNC under both OS rules",
        given(file="C:\\adapter"),
        Opt,
        "leads out of",
    ),
    Row(
        "an adapter by a link out of the folder",
        "1.systems: PR 46287 (resolver path escape by `..`, absolute, symlink)",
        given(
            both(out_of_folder(WEIGHTS), move(WEIGHTS, "style.safetensors")),
            file="style.safetensors",
        ),
        Bad,
        "style.safetensors is a link that leads out of",
    ),
    Row(
        "an address for a source",
        "1.systems: issue 798: path traversal / SSRF via adapter_id",
        given(source="http://169.254.169.254/latest/meta-data"),
        Not,
        "there is no file or folder 'http://169.254.169.254/latest/meta-data'.*user/name",
    ),
    Row(
        "a source that leads up",
        "1.systems: issue 798: path traversal / SSRF via adapter_id",
        given(source="user/../../../etc"),
        Not,
        "there is no file or folder 'user/../../../etc'",
    ),
    Row(
        "a repository of which the name is dots",
        "1.systems: issue 798: path traversal / SSRF via adapter_id",
        given(source="user/.."),
        Not,
        r"user/\.\.",
    ),
    Row(
        "a folder named in the adapter's name",
        "1.systems: LoRA name in the prompt could read outside the LoRA dir",
        given(name="../../etc/passwd"),
        Opt,
        "adapter name '../../etc/passwd' is not",
    ),
    Row("no source", "own: sources that are none", given(source=None), Opt, "source=None"),
    Row("a number for a source", "own: sources that are none", given(source=5), Opt, "source=5"),
    Row(
        "bytes for a source",
        "own: sources that are none",
        given(source=b"adapter"),
        Opt,
        "source=b'adapter'",
    ),
    Row(
        "a source with a NUL byte",
        "own: paths that the system refuses",
        given(source="adapter\0"),
        Not,
        "there is no file or folder",
    ),
    Row(
        "a source longer than a path may be",
        "own: paths that the system refuses",
        given(source="x" * 5000),
        Not,
        "there is no file or folder",
    ),
    Row(
        "a source longer than a name may be",
        "own: paths that the system refuses",
        given(source="x" * 300),
        Not,
        "there is no file or folder|cannot be",
    ),
    Row(
        "a file with a NUL byte",
        "own: paths that the system refuses",
        given(file="a\0b"),
        Bad,
        r"'a\\x00b' is no file",
    ),
    Row(
        "a file longer than a name may be",
        "own: paths that the system refuses",
        given(file="x" * 300),
        Not,
        "xxx",
    ),
    Row("a number for the file", "own: files that are none", given(file=5), Opt, "file=5"),
    Row(
        "a source that links to itself",
        "own: a loop of links for a source",
        given(lambda f: os.symlink("me", f / "me"), source=lambda f: f / "me"),
        Not,
        "there is no file or folder",
    ),
    Row(
        "a name of five thousand letters",
        "4.goals: adapter names [A-Za-z0-9_-]{1,64}",
        given(name="x" * 5000),
        Opt,
        "is not 1 to 64 letters",
    ),
    Row(
        "a name of 65 letters",
        "4.goals: adapter names [A-Za-z0-9_-]{1,64}",
        given(name="x" * 65),
        Opt,
        "is not 1 to 64 letters",
    ),
    Row(
        "a name with a line break",
        "4.goals: adapter names [A-Za-z0-9_-]{1,64}",
        given(name="style\n"),
        Opt,
        "is not 1 to 64 letters",
    ),
    Row(
        "an adapter named like peft's factors",
        '1.issues: 2772 / 2699 (adapter names / module names holding "weight" or "lora")',
        given(name="lora_A"),
        Opt,
        "'lora_A' is also a part of module names",
    ),
    Row(
        "an adapter named like a method of a dict",
        '1.issues: 2772 / 2699 (adapter names / module names holding "weight" or "lora")',
        given(name="items"),
        Opt,
        "'items' is also a part of module names",
    ),
    Row(
        "an adapter named like a path segment",
        "1.issues: 3584 (save drops tensors when another adapter's name equals a path segment)",
        given(name="layers"),
        Opt,
        "'layers' is also a part of module names",
        host="loaded",
    ),
)

KILLED = (
    Row(
        "a config that a killed save cut",
        "2.crash: kill -9: adapter_config.json CORRUPT (open 'w' truncates in place)",
        patch(CONFIG, lambda data: data[: len(data) // 2]),
        Bad,
        "adapter_config.json: it is no valid JSON",
    ),
    Row(
        "a cut config beside our own file",
        "2.crash: kill -9: adapter_config.json CORRUPT (open 'w' truncates in place)",
        patch(CONFIG, lambda data: data[: len(data) // 2]),
        None,
        "repaired: adapter_config.json is broken .it is no valid JSON",
        file="ours",
    ),
    Row(
        "new weights with an old config, foreign",
        "2.crash: NEW weights with OLD config = silent wrong scale when alpha changed",
        config(r=4, lora_alpha=44),
        Mis,
        "rank 16 in file, 4 in config",
    ),
    Row(
        "new weights with an old config",
        "2.crash: NEW weights with OLD config = silent wrong scale when alpha changed",
        config(lora_alpha=44),
        None,
        "repaired: lora_alpha is 44 in adapter_config.json, but 11 in the header, which holds",
        file="ours",
    ),
    Row(
        "a folder with nothing but a README",
        "2.crash: into a fresh dir: killed early: nothing but README",
        both(drop(CONFIG), drop(WEIGHTS), write("README.md", b"")),
        Not,
        "the folder holds no adapter_config.json with adapter_model.safetensors",
    ),
    Row(
        "an empty folder",
        "2.crash: newest lacks trainer_state.json / adapter weights / is empty",
        both(drop(CONFIG), drop(WEIGHTS)),
        Not,
        "the folder holds no adapter_config.json with adapter_model.safetensors",
    ),
    Row(
        "a checkpoint without its weights",
        "2.crash: newest lacks trainer_state.json / adapter weights / is empty",
        drop(WEIGHTS),
        Not,
        "the folder holds no adapter_config.json with adapter_model.safetensors",
    ),
    Row(
        "a config of no bytes",
        "2.crash: newest has a zero-byte adapter_config.json",
        write(CONFIG, b""),
        Bad,
        "adapter_config.json: it is no valid JSON",
    ),
    Row(
        "a config of no bytes beside our own file",
        "2.crash: newest has a zero-byte adapter_config.json",
        write(CONFIG, b""),
        None,
        "repaired: adapter_config.json is broken",
        file="ours",
    ),
    Row(
        "an optimizer's state in place of the weights",
        "2.crash: newest has truncated optimizer / rng",
        both(drop(WEIGHTS), write("optimizer.pt", b"PK")),
        Not,
        "the folder holds no adapter_config.json",
    ),
    Row(
        "weights that are zeros from the middle on",
        "1.issues: 907 / 286 (corrupt checkpoints)",
        patch(WEIGHTS, lambda data: data[: len(data) - 2000] + bytes(2000)),
        Bad,
        "its content has the digest",
        file="ours",
    ),
    Row(
        "weights with one bit flipped",
        "1.issues: 907 / 286 (corrupt checkpoints)",
        patch(WEIGHTS, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]),
        Bad,
        "its content has the digest",
        file="ours",
    ),
    Row(
        "a header with one byte lost",
        "1.issues: 907 / 286 (corrupt checkpoints)",
        patch(WEIGHTS, lambda data: data[:20] + data[21:]),
        Bad,
        "no valid JSON|no whole safetensors",
        file="ours",
    ),
    Row(
        "shapes for another size after a layer was attached",
        "2.transaction: Failed load leaves the base changed: (p) 36 lora modules left in",
        edit(A, lambda t: torch.zeros(16, 64)),
        Mis,
        r"another size: model\.layers\.1\.self_attn\.q_proj\.lora_A is \(16, 64\)",
    ),
    Row(
        "shapes for another size beside an adapter that is there",
        "2.transaction: (t) same, and retry fails",
        given(edit(B, lambda t: torch.zeros(64, 16)), name="second"),
        Mis,
        r"another size: model\.layers\.1\.self_attn\.q_proj\.lora_B is \(64, 16\)",
        host="loaded",
    ),
    Row(
        "a model that is training, which goes on training",
        "2.transaction: load_adapter(is_trainable=False) switches the WHOLE model to eval mode",
        given(),
        None,
        "frozen",
        host="training",
    ),
    Row(
        "a refusal while the model is training",
        "2.transaction: load_adapter(is_trainable=False) switches the WHOLE model to eval mode",
        edit(A, lambda t: torch.zeros(16, 64)),
        Mis,
        "another size",
        host="training",
    ),
    Row(
        "a host with an adapter merged in",
        "3.traps: save while merged: right; set_adapter while merged",
        given(name="second"),
        MergeError,
        "merged into the weights .*unmerge_lora",
        host="merged",
    ),
    Row(
        "a host in bf16, where the factors stay in fp32",
        "3.traps: fp16 base: peft upcasts adapters to fp32; transformers keeps bf16",
        given(),
        None,
        "4 targets, .* float32",
        host="bf16",
    ),
    Row(
        "an adapter on the tied output matrix",
        "3.traps: tied embeddings, LoRA on lm_head",
        respell("model.layers.1.self_attn.q_proj", "lm_head"),
        Mis,
        "config does not target|another size|targets 1 layers",
    ),
)

GOALS = (
    Row(
        "a config over a megabyte",
        "4.goals: config <= 1 MiB",
        patch(CONFIG, lambda data: data + b" " * (1 << 20)),
        Bad,
        r"adapter_config.json: it has over 1,048,576 bytes.*LoadLimits\(config=",
        costs="all",
    ),
    Row(
        "a config over a megabyte, trusted",
        "4.goals: config <= 1 MiB",
        given(
            patch(CONFIG, lambda data: data + b" " * (1 << 20)), limits=LoadLimits(config=2 << 20)
        ),
        None,
        "4 targets",
    ),
    Row(
        "a config nested 33 deep",
        "4.goals: depth <= 32",
        config(corda_config=json.loads('{"a":' * 32 + "1" + "}" * 32)),
        Bad,
        "adapter_config.json: it is nested deeper than 32 levels",
    ),
    Row(
        "a header over the limit",
        "4.goals: header <= 16 MiB",
        given(limits=LoadLimits(header=100)),
        Bad,
        r"its header has [\d,]+ bytes, over the limit of 100.*LoadLimits\(header=",
    ),
    Row(
        "more tensors than the limit",
        "4.goals: <= 200k tensors",
        given(limits=LoadLimits(tensors=3)),
        Bad,
        r"names more than 3 tensors.*LoadLimits\(tensors=",
    ),
    Row(
        "a scaling over the limit",
        "4.goals: |alpha/r| <= 1000 unless allowed",
        config(lora_alpha=16 * 1001),
        Bad,
        r"scaling at .* is 1001, .*lora_alpha.*LoadLimits\(scaling=",
    ),
    Row(
        "a negative scaling over the limit",
        "4.goals: |alpha/r| <= 1000 unless allowed",
        config(alpha_pattern={"q_proj": -16 * 1001}),
        Bad,
        "scaling at .*q_proj is -1001",
    ),
    Row(
        "a scaling over the limit, trusted",
        "4.goals: |alpha/r| <= 1000 unless allowed",
        given(config(lora_alpha=11 * 1024), limits=LoadLimits(scaling=1e4)),
        None,
        "4 targets",
        scale=1024.0,
    ),
    Row(
        "no scaling at all",
        "own: a scaling of nothing",
        config(lora_alpha=0),
        Bad,
        "scaling at .* is 0, which is nothing",
    ),
    Row(
        "a scaling of nothing for LoHa",
        "own: a scaling of nothing",
        config(alpha=0),
        Bad,
        "scaling .*is 0, which is nothing",
        file="loha",
    ),
    Row(
        "a scaling far off for LoHa",
        "own: alpha of other kinds than LoRA",
        config(alpha=1e30),
        Bad,
        "scaling at .*far off. Expected alpha",
        file="loha",
    ),
    Row(
        "a scaling far off at one target of LoHa",
        "own: alpha of other kinds than LoRA",
        config(alpha_pattern={"q_proj": 1e30}),
        Bad,
        "scaling at .*far off. Expected alpha",
        file="loha",
    ),
    Row(
        "an alpha in quotes for LoHa",
        "own: alpha of other kinds than LoRA",
        config(alpha="4"),
        Bad,
        "alpha is '4'",
        file="loha",
    ),
    Row(
        "an alpha in quotes at one target of LoKr",
        "own: alpha of other kinds than LoRA",
        config(alpha_pattern={"q_proj": "4"}),
        Bad,
        "alpha_pattern.*'4'",
        file="lokr",
    ),
    Row(
        "a factor of LoKr that divides nothing",
        "own: sizes of other kinds than LoRA",
        config(decompose_factor="x"),
        Bad,
        "decompose_factor is 'x', not",
        file="lokr",
    ),
    Row(
        "NaN in the scales of IA3",
        "own: not finite values of other kinds",
        tensors(lambda t: {k: v * float("nan") for k, v in t.items()}),
        Bad,
        "ia3_l holds NaN or infinite values",
        file="ia3",
    ),
    Row(
        "another alpha for LoHa beside our own file",
        "own: repairs of other kinds than LoRA",
        config(alpha=44),
        None,
        "repaired: alpha is 44 in adapter_config.json, but 11 in the header",
        file="our loha",
    ),
    Row(
        "a module trained whole that the class has not",
        "4.goals: Full-layer content needs permission and is listed by name and size",
        given(),
        Mis,
        "brings classifier whole, which is no module of BertForMaskedLM|another architecture",
        file="head",
        host="bert lm",
    ),
    Row(
        "a head of other labels",
        "4.goals: Full-layer content needs permission and is listed by name and size",
        edit("base_model.model.classifier.weight", lambda t: t[:2].clone()),
        Mis,
        r"another size: classifier.weight is \(2, 32\) in the file, \(3, 32\) on",
        file="head",
    ),
    Row(
        "a head without its bias",
        "4.goals: Full-layer content needs permission and is listed by name and size",
        tensors(lambda t: void(t.pop("base_model.model.classifier.bias"))),
        Mis,
        r"1 tensors are missing \(classifier.bias\)",
        file="head",
    ),
    Row(
        "a head of integers",
        "own: a head of integers",
        edit("base_model.model.classifier.weight", lambda t: t.to(torch.int8)),
        Bad,
        "classifier.weight holds int8 values where the host has float32",
        file="head",
    ),
    Row(
        "NaN in a head",
        "own: NaN in a head",
        edit("base_model.model.classifier.weight", lambda t: t * float("nan")),
        Bad,
        "classifier.weight holds NaN or infinite values",
        file="head",
    ),
    Row(
        "a head that is listed and not there",
        "own: a head that is listed and not there",
        tensors(lambda t: {k: v for k, v in t.items() if "classifier" not in k}),
        Mis,
        "modules_to_save lists 'classifier', but the file has no tensors for classifier",
        file="head",
    ),
    Row(
        "new tokens without tensors",
        "own: trainable_token_indices without tensors",
        config(trainable_token_indices=[3]),
        Mis,
        "1 tensors are missing .*token_adapter",
    ),
    Row(
        "new tokens beyond the vocabulary",
        "own: trainable_token_indices beyond the vocabulary",
        config(trainable_token_indices=[96]),
        Mis,
        "trainable_token_indices has token 96, and the largest vocabulary .* has 96 tokens",
    ),
    Row(
        "a rank above the layer, which is legal",
        "4.goals: r <= min(in, out)",
        given(),
        None,
        "rank is above min.in, out. at",
        file="high rank",
    ),
    Row(
        "a file that needs an adapter's own bias and has none",
        "own: lora_bias without tensors",
        config(lora_bias=True),
        Mis,
        "lora_bias is set but .* has no lora_B.bias",
    ),
    Row(
        "biases of the base",
        "own: bias of the base",
        config(bias="all"),
        Bad,
        "changes base weights: bias='all'.*lora_bias=True",
    ),
    Row(
        "two keys of one name in the config",
        "own: duplicate keys in the config",
        config_text('"r": 16', '"r": 8, "r": 16'),
        Bad,
        "adapter_config.json: it is no valid JSON .the key 'r' stands twice",
    ),
    Row(
        "half a surrogate in the config",
        "own: text that no encoding has",
        config_text('"r": 16', '"r": 16, "revision": "\\ud800"'),
        Bad,
        "adapter_config.json: it is no valid JSON",
    ),
    Row(
        "limits that are none",
        "own: limits that are none",
        given(limits={"header": 1}),
        Opt,
        "limits is a dict.*LoadLimits",
    ),
)

CONTAINER = (
    Row(
        "a header that is longer than the file",
        "1.systems: header <= 100,000,000 B",
        lambda f: write_raw(f / WEIGHTS, b"{}", b"", length=2**63),
        Bad,
        "no whole safetensors file: 10 bytes, header of 9223372036854775808",
        costs="all",
    ),
    Row(
        "a header of all bytes there can be",
        "1.systems: header <= 100,000,000 B",
        lambda f: write_raw(f / WEIGHTS, b"{}", b"", length=2**64 - 1),
        Bad,
        "no whole safetensors file",
    ),
    Row(
        "a header one byte too long",
        "1.systems: header <= 100,000,000 B",
        patch(WEIGHTS, lambda data: bytes([data[0] + 1]) + data[1:]),
        Bad,
        "no valid JSON|no whole",
    ),
    Row(
        "bytes that belong to no tensor",
        "1.systems: every byte covered, no holes, no overlap",
        container(lambda h, data: (h, data + bytes(4))),
        Bad,
        "no whole safetensors file: its tensors end at",
    ),
    Row(
        "a hole between tensors",
        "1.systems: every byte covered, no holes, no overlap",
        header(
            lambda h: h.update({A: {**h[A], "data_offsets": [x + 4 for x in h[A]["data_offsets"]]}})
        ),
        Bad,
        "no whole safetensors file: .* stands at",
    ),
    Row(
        "tensors that share all their bytes",
        "1.systems: every byte covered, no holes, no overlap",
        header(lambda h: h.update({A.replace("q_proj", "k_proj"): h[A]})),
        Bad,
        "no whole safetensors file: .* stands at",
    ),
    Row(
        "one tensor twice in the header",
        "1.systems: duplicate keys disallowed by spec",
        lambda f: twice(f, A),
        Bad,
        "the header is no valid JSON .the key '.*q_proj.lora_A.weight' stands twice",
    ),
    Row(
        "the metadata twice in the header",
        "1.systems: duplicate header keys accepted (last wins) although the spec disallows",
        lambda f: twice(f, "__metadata__"),
        Bad,
        "the header is no valid JSON .the key '__metadata__' stands twice",
    ),
    Row(
        "the manifest twice in the metadata of our own file",
        "1.systems: duplicate header keys accepted (last wins) although the spec disallows",
        patch(WEIGHTS, lambda data: manifest_twice(data)),
        Bad,
        "the header is no valid JSON .the key 'hf_lora' stands twice",
        file="ours",
    ),
    Row(
        "metadata that does not map text to text",
        "own: metadata of another type",
        header(lambda h: h.update(__metadata__={"format": 5})),
        Bad,
        "its metadata does not map text to text|__metadata__",
    ),
    Row(
        "metadata that is a list",
        "own: metadata of another type",
        header(lambda h: h.update(__metadata__=["pt"])),
        Bad,
        "metadata",
    ),
    Row(
        "metadata of ninety megabytes",
        "1.systems: 90 MB metadata accepted (573 MB RSS, 1 s)",
        lambda f: big_metadata(f),
        Bad,
        "its header has 94,371,840 bytes, over the limit",
        costs="all",
    ),
    Row(
        "a header of ten thousand tensors that are none",
        "1.systems: one libFuzzer target: structure-aware inputs, >60 findings in 8 other loaders",
        header_only(
            {f"x{i}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for i in range(10_000)},
            bytes(4),
        ),
        Bad,
        "no whole safetensors file",
        costs="all",
    ),
    Row(
        "an adapter for no layer of the model",
        "1.systems: 55193 (adapter that targets no configured module silently serves the base)",
        respell("model.layers", "model.blocks"),
        Mis,
        "another architecture: 4 of its 4 targets",
    ),
    Row(
        "keys that no adapter has",
        "1.systems: rank <= max_lora_rank, unsupported keys raise",
        put(f"{LAYER}.lora_C.weight"),
        Mis,
        "1 have no place .*q_proj.lora_C",
    ),
    Row(
        "keys of a target that the model has not",
        "1.systems: rank <= max_lora_rank, unsupported keys raise",
        both(
            put(A.replace("layers.1", "layers.7"), torch.zeros(16, 32)),
            put(B.replace("layers.1", "layers.7"), torch.zeros(32, 16)),
        ),
        Mis,
        "1 of its 5 targets are no modules of LlamaForCausalLM, for instance model.layers.7",
    ),
    Row(
        "a key without a module",
        "own: keys that name nothing",
        put("base_model.model.lora_A.weight"),
        Bad,
        "neither LORA factors",
    ),
    Row(
        "a base copy without a module",
        "own: keys that name nothing",
        put("base_model.model.base_layer.weight"),
        Mis,
        "own copy of the base weight",
    ),
    Row(
        "a key of no characters",
        "own: keys that name nothing",
        put(""),
        Bad,
        "neither LORA factors",
    ),
    Row(
        "half a surrogate in a key",
        "own: text that no encoding has",
        lambda f: surrogate(f),
        Bad,
        "the header is no valid JSON",
    ),
)


def twice(folder, key):
    path = folder / WEIGHTS
    values, data = raw_header(path)
    text = json.dumps(values)
    again = json.dumps({key: values.get(key, {})})[1:-1]
    write_raw(path, (text[:-1] + f", {again}}}").encode(), data)


def manifest_twice(data):
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].replace(b'"hf_lora":', b'"hf_lora":"{}","hf_lora":', 1)
    return len(text).to_bytes(8, "little") + text + data[end:]


def big_metadata(folder):
    path = folder / WEIGHTS
    path.write_bytes((90 << 20).to_bytes(8, "little") + b'{"__metadata__": {"a": "')
    os.truncate(path, 91 << 20)


def surrogate(folder):
    path = folder / WEIGHTS
    values, data = raw_header(path)
    write_raw(path, json.dumps(values).replace("q_proj", "\\ud800", 1).encode(), data)


def every(name, value, words, **more):
    """A row for a manifest field of a wrong kind."""
    return Row(
        f"a manifest in which {name} is {'missing' if value is GONE else str(value)[:30]}",
        f"own: manifest field {name}",
        manifest(**{name: value}),
        Bad,
        words,
        file="ours",
        **more,
    )


def in_base(**fields):
    return manifest(lambda m: m["base"].update(fields))


def sample(change):
    """Edits one entry of the fingerprint."""

    def edited(values):
        found = values["base"]["fingerprints"]["model"]["tensors"]
        change(found, next(iter(found)))

    return manifest(edited)


MANIFEST = (
    Row(
        "a manifest that is no JSON",
        "own: a damaged manifest",
        metadata(**{KEY: "{"}),
        Bad,
        "the manifest is no valid JSON",
        file="ours",
    ),
    Row(
        "a manifest that is a list",
        "own: a damaged manifest",
        metadata(**{KEY: "[]"}),
        Bad,
        "manifest is no object",
        file="ours",
    ),
    Row(
        "NaN in a manifest",
        "own: a damaged manifest",
        patch(WEIGHTS, lambda data: data.replace(b'\\"lora_alpha\\":11', b'\\"lora_alpha\\":NaN')),
        Bad,
        "NaN is no JSON number|no valid JSON|no whole",
        file="ours",
    ),
    Row(
        "one field twice in a manifest",
        "own: a damaged manifest",
        header(
            lambda h: h["__metadata__"].update(
                {KEY: h["__metadata__"][KEY].replace('"host":', '"host":"x","host":')}
            )
        ),
        Bad,
        "the manifest is no valid JSON .the key 'host' stands twice",
        file="ours",
    ),
    every(
        "format", 2, "format of the manifest is 2, which this hf_lora does not know.*Update hf_lora"
    ),
    every("format", 0, "format of the manifest is 0, not a version number"),
    every("format", "1", "format of the manifest is '1', not a version number"),
    every("format", True, "format of the manifest is True, not a version number"),
    every("format", GONE, "format of the manifest is None, not a version number"),
    every(
        "critical",
        ["mirrored"],
        "critical of the manifest has 'mirrored', which this hf_lora does not",
    ),
    every("critical", "fused", "critical of the manifest is no list"),
    every("critical", [5], "critical of the manifest is no list"),
    every("critical", ["x"] * 2000, "critical of the manifest is no list of at most 1000 words"),
    every("optional", {"a": 1}, "optional of the manifest is no list"),
    every("digest", "", "digest of the manifest is '', not v1:sha256:"),
    every("digest", 5, "digest of the manifest is int, not text"),
    every("digest", "v1:md5:00", "digest of the manifest is 'v1:md5:00'"),
    every("digest", "v1:sha256:" + "0" * 64, "its content has the digest .*states v1:sha256:000"),
    every("digest", "\n" + "v1:sha256:" + "0" * 64, "digest of the manifest is"),
    every("digest", "v2:sha256:" + "0" * 64, "digest of the manifest is 'v2:sha256:"),
    every("configs", [], "configs of the manifest is list, not an object"),
    every("configs", {}, "configs of the manifest does not hold one config for each component"),
    every("configs", {"model": 5}, "configs of the manifest does not hold one config for each"),
    every(
        "configs",
        {"unet": {"peft_type": "LORA"}},
        "the configs of its manifest are for unet, not for a model",
    ),
    every("configs", {"model": {}}, "peft_type is None"),
    every("configs", {"model": {"peft_type": "LORA"}}, "r is None, not a positive whole number"),
    every("base", "llama", "base of the manifest is str, not an object"),
    every("host", 5, "host of the manifest is int, not text"),
    every("family", ["llama"], "family of the manifest is list, not text"),
    every("fused", [1], "fused of the manifest is list, not an object"),
    every("training", "long", "training of the manifest is str, not an object"),
    every("trigger_words", "cat", "trigger_words of the manifest is no list"),
    every(
        "trigger_words", ["x"] * 1001, "trigger_words of the manifest is no list of at most 1000"
    ),
    every("derived_from", [None], "derived_from of the manifest is no list"),
    every("training", {"a": json.loads("[" * 40 + "]" * 40)}, "the manifest is nested deeper than"),
    Row(
        "a base of which the id is a list",
        "own: manifest field base",
        in_base(id=["llama"]),
        Bad,
        "id of the manifest is list, not text",
        file="ours",
    ),
    Row(
        "a base of which the commit is a number",
        "own: manifest field base",
        in_base(revision=5),
        Bad,
        "revision of the manifest is int, not text",
        file="ours",
    ),
    Row(
        "fingerprints that are a list",
        "own: a malformed fingerprint",
        in_base(fingerprints=[]),
        Bad,
        "fingerprints of the manifest is list, not an object",
        file="ours",
    ),
    Row(
        "a fingerprint that is text",
        "own: a malformed fingerprint",
        in_base(fingerprints={"model": "x"}),
        Bad,
        "the fingerprint is no object of version and tensors",
        file="ours",
    ),
    Row(
        "a fingerprint of a newer version",
        "own: a malformed fingerprint",
        manifest(lambda m: m["base"]["fingerprints"]["model"].update(version=2)),
        Bad,
        "the fingerprint has another version than 1; update hf_lora",
        file="ours",
    ),
    Row(
        "a fingerprint of which the values are no base64",
        "own: values of a fingerprint",
        sample(lambda found, name: found[name].update(fp32="%%%")),
        Bad,
        "fingerprint of 'model': the values of .* are not base64",
        file="ours",
    ),
    Row(
        "a fingerprint with too few values",
        "own: values of a fingerprint",
        sample(lambda found, name: found.update({name: {"shape": [4, 4], "fp32": "AAAA"}})),
        Bad,
        "3 bytes of values, 64 fit its shape",
        file="ours",
    ),
    Row(
        "a fingerprint of a negative shape",
        "own: values of a fingerprint",
        sample(lambda found, name: found[name].update(shape=[-1, 4])),
        Bad,
        "the shape of .* is not one that a tensor can have",
        file="ours",
    ),
    Row(
        "a fingerprint of a shape that overflows",
        "own: values of a fingerprint",
        sample(lambda found, name: found[name].update(shape=[2**62, 4])),
        Bad,
        "the shape of .* is not one that a tensor can have",
        file="ours",
    ),
    Row(
        "a fingerprint of other values",
        "4.goals: Base fingerprint: wrong base of same size detected",
        sample(
            lambda found, name: found.update({name: {**found[name], "fp32": zeros(found, name)}})
        ),
        Mis,
        "made on another base: 1 of",
        file="ours",
    ),
    Row(
        "a file from which the fingerprint was taken",
        '4.goals: Absent fingerprint (foreign adapter) = stated "unverified", not silent',
        in_base(fingerprints={}),
        None,
        "base: not verified: the file carries no fingerprint",
        file="ours",
    ),
    Row(
        "a file from which the whole manifest was taken",
        '4.goals: Absent fingerprint (foreign adapter) = stated "unverified", not silent',
        metadata(**{KEY: GONE}),
        None,
        "base: not verified: the file carries no fingerprint",
        file="ours",
    ),
    Row(
        "a fingerprint that shares no name with the base",
        '4.goals: Absent fingerprint (foreign adapter) = stated "unverified", not silent',
        manifest(
            lambda m: m["base"]["fingerprints"]["model"].update(
                tensors={"x": {"shape": [2, 2], "fp32": "AAAAAAAAAAAAAAAAAAAAAA=="}}
            )
        ),
        None,
        "base: not verified: the host has 0 of 1 weights by their names",
        file="ours",
    ),
    Row(
        "a field that no manifest has",
        "own: a field that no manifest has is passed over",
        manifest(mood="good"),
        None,
        "4 targets",
        file="ours",
    ),
    Row(
        "another alpha in the manifest",
        "4.goals: config hash inside the safetensors metadata so a mixed pair is refused",
        manifest_config(lora_alpha=44),
        Bad,
        "its content has the digest",
        file="ours",
    ),
    Row(
        "another rank in the manifest",
        "4.goals: config hash inside the safetensors metadata so a mixed pair is refused",
        signed(manifest_config(r=8)),
        Mis,
        "rank 16 in file, 8 in config",
        file="ours",
    ),
    Row(
        "a rank in quotes in the manifest",
        "own: configs of a manifest",
        signed(manifest_config(r="16")),
        Bad,
        "r is '16', not a positive whole number",
        file="ours",
    ),
    Row(
        "fewer targets in the manifest than in the file",
        "own: configs of a manifest",
        signed(manifest_config(target_modules=["q_proj"])),
        Mis,
        "tensors for 2 layers that its config does not target",
        file="ours",
    ),
    Row(
        "a field of a newer peft in the manifest",
        "own: configs of a manifest",
        signed(manifest_config(lora_temperature=2)),
        Bad,
        "'lora_temperature' is not known",
        file="ours",
    ),
    Row(
        "the kind of LoHa in the manifest",
        "own: kinds of a manifest",
        signed(manifest_config(peft_type="LOHA")),
        Bad,
        "neither LOHA factors",
        file="ours",
    ),
    Row(
        "a rank of a billion in the manifest of LoHa",
        "own: kinds of a manifest",
        signed(manifest_config(r=10**9)),
        Bad,
        "r is 1000000000, but no tensor",
        file="our loha",
    ),
)


def zeros(found, name):
    count = min(32, math.prod(found[name]["shape"]))
    return base64.b64encode(bytes(4 * count)).decode()
