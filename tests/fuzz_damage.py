"""Structured damage to adapter files, as Hypothesis draws it."""

import copy
import json
from contextlib import suppress

import peft
import torch
from hypothesis import strategies as st

from hf_lora.formats.container import DTYPES
from tests.fuzz_files import (
    GOOD,
    MANIFEST,
    PREFIX,
    RAW,
    STATED,
    Case,
    draft_of,
    dumped,
    laid_out,
    packed,
)

# ---------------------------------------------------------------- damage to JSON

# fmt: off
NUMBERS = [0, -1, 1, 2, 4, 8, 0.5, -0.5, 4.0, 1e-308, 1e38, 1e308, 10**9, 10**30, 10**400, 2**53,
           2**63, float("nan"), float("inf"), -float("inf"), True, False, None, *RAW]
TEXTS = ["", " ", "x", "8", "nan", "..", "../../etc/passwd", "/dev/zero", "\0", "q_proj\0",
         "\ud800", "\u202eq", "\uff51_proj", "\x1b[2J", "y" * 5000, "(a+)+$", ".*", "*", "^", "$",
         ".", "a..b", "-", "all-linear", "LORA", "lora", "LOHA", "IA3", "SUPERLORA", "pissa", "eva",
         "gaussian", "all", "q_proj", "v_proj", "lm_head", "embed_tokens", "model", "classifier",
         "weight", "os"]
NESTS = [[], {}, [[]], [None], [1, "a"], [""], ["q_proj"], [["q_proj"]], [0, 1], [5, 1], [0, 2],
         {"": 1}, {"a": {}}, {"q_proj": 4}, {"q_proj": "4"}, {"q_proj": True}, {"^": 1}, {"$": 2},
         {"(a+)+$": 4}, {"embed_tokens": [5, 1]}, {"embed_tokens": [1, 1]}, list(range(2000)),
         ["q_proj"] * 500, {str(i): i for i in range(500)}]
SIZES = [0, 1, 2, -1, 4.0, True, None, "4", [4], 2**31, 2**53, 2**63, 2**64, 10**30, 10**400,
         "<inf>"]
# fmt: on
NESTS += [json.loads("[" * n + "]" * n) for n in (28, 29, 30, 31, 32, 40)]  # 32 are allowed
NESTS += [json.loads('{"a":' * n + "1" + "}" * n) for n in (28, 30, 32)]
FIELDS = [*peft.LoraConfig.__dataclass_fields__, *peft.LoHaConfig.__dataclass_fields__]
OTHERS = {f for k in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values() for f in k.__dataclass_fields__}
KEYS = [*FIELDS * 3, *sorted(OTHERS), "alpha", "rank", "scaling", "network_alpha", "new_maths", ""]


def _pool(items):
    # by number: shrinking then goes to the front, and no draw copies the pool
    return st.integers(0, len(items) - 1).map(lambda n: items[n])


VALUES = st.one_of(
    _pool(NUMBERS), _pool(TEXTS), _pool(NESTS), st.integers(-2, 9), st.text(max_size=4)
).map(copy.deepcopy)  # a later damage may go into it, and the pools must stay as they are


def damage_json(draw, draft):
    """Changes one value or key, at any depth, of one document."""
    rows = draft.documents()
    if not rows:
        return "no document left"
    what, node = draw(_pool(rows))
    way = [what]
    while node:
        key = draw(_pool(list(node) if isinstance(node, dict) else range(len(node))))
        way.append(str(key)[:80])
        if not isinstance(node[key], dict | list) or not node[key] or draw(st.booleans()):
            break
        node = node[key]
    else:
        return f"{what} is empty"
    action = draw(_pool(list(JSON_ACTIONS)))
    return f"{'/'.join(way)}: {action} {JSON_ACTIONS[action](draw, node, key)}"


def _replace(draw, node, key):
    node[key] = draw(VALUES)
    return repr(node[key])[:80]


def _drop(draw, node, key):
    del node[key]
    return ""


def _rename(draw, node, key):
    if isinstance(node, list):
        return _replace(draw, node, key)
    new = draw(_pool([key.upper(), f"{key} ", key[:-1], f"unet.{key}", f"^{key}", *KEYS, *TEXTS]))
    node[new] = node.pop(key)
    return repr(new)[:80]


def _add(draw, node, key):
    value = draw(VALUES)
    if isinstance(node, list):
        node.append(value)
        return repr(value)[:80]
    new = draw(_pool(KEYS))
    # the flat document of a pipeline has the component in front
    new = f"{key.partition('.')[0]}.{new}" if "." in key and draw(st.booleans()) else new
    node[new] = value
    return f"{new}={value!r}"[:80]


def _swap(draw, node, key):
    other = draw(_pool(list(node) if isinstance(node, dict) else range(len(node))))
    node[key], node[other] = node[other], node[key]
    return f"with {other}"[:80]


def _retype(draw, node, key):
    value = node[key]
    ways = [str(value)[:5000], json.dumps(value)[:5000], bool(value), [value], [value] * 2]
    ways.append({"x": value})
    if isinstance(value, int | float) and abs(value) < 1e300:  # neither NaN nor infinite
        ways += [float(value), int(value), value * 2, -value]
    if isinstance(value, list):
        ways += [value[::-1], value[1:], value * 2, dict.fromkeys(map(str, value), 1), len(value)]
    if isinstance(value, dict):
        ways += [list(value), list(value.values()), {k: 1 for k in value}]
    node[key] = draw(_pool(ways))
    return repr(node[key])[:80]


JSON_ACTIONS = {
    "replace": _replace,
    "retype": _retype,
    "add": _add,
    "drop": _drop,
    "rename": _rename,
    "swap": _swap,
}


def damage_metadata(draw, draft):
    """Changes the header's texts as a whole."""
    key = draw(_pool([*draft.metadata, MANIFEST, STATED, "format", *TEXTS[:12]]))
    action = draw(_pool(["drop", "replace", "rename"]))
    value = draft.metadata.pop(key, "")
    if action == "replace":
        draft.metadata[key] = draw(VALUES)
    if action == "rename":
        draft.metadata[draw(_pool([MANIFEST, STATED, "x", key.upper()]))] = value
    return f"metadata {key!r}: {action}"


# ---------------------------------------------------------------- damage to tensors

CASTS = list(DTYPES.values())


def _at(value):
    def change(draw, tensor):
        flat = tensor.clone().reshape(-1)
        flat[draw(st.integers(0, max(0, len(flat) - 1)))] = value
        return flat.reshape(tensor.shape)

    return change


def _cut(draw, tensor):
    if not tensor.ndim:
        return tensor
    axis = draw(st.integers(0, tensor.ndim - 1))
    return tensor.narrow(axis, 0, draw(st.integers(0, tensor.shape[axis])))


TENSOR_ACTIONS = {
    "nan": _at(float("nan")),
    "inf": _at(float("-inf")),
    "huge": _at(3e38),
    "denormal": _at(1e-44),
    "zero": lambda draw, t: t * 0,
    "double": lambda draw, t: t.double() * draw(_pool([1, 1 / 3, 1e300, 1e-300])),
    "cast": lambda draw, t: t.to(draw(_pool(CASTS))),
    "transpose": lambda draw, t: t.transpose(0, -1) if t.ndim else t,
    "cut": _cut,
    "flat": lambda draw, t: t.reshape(-1),
    "deep": lambda draw, t: t[..., None],
    "one": lambda draw, t: torch.tensor(0.5),
    "grow": lambda draw, t: torch.cat([t, t]) if t.ndim else t,
}


def damage_values(draw, draft):
    """Changes the values, dtype or shape of one tensor, or the rank of a target on both sides."""
    if not draft.tensors:
        return "no tensor left"
    name = draw(_pool(sorted(draft.tensors)))
    action = draw(_pool([*TENSOR_ACTIONS, "rank"]))
    if action == "rank":
        return _other_rank(draw, draft, name)
    tensor = draft.tensors[name]
    with suppress(RuntimeError, IndexError):  # not every value fits every tensor
        draft.tensors[name] = TENSOR_ACTIONS[action](draw, tensor)
    return f"{name}: {action} {draft.tensors[name].dtype} {tuple(draft.tensors[name].shape)}"


def _other_rank(draw, draft, name):
    path = name.partition(".lora_")[0]
    a, b = (f"{path}.lora_{x}.weight" for x in "AB")
    if any(x not in draft.tensors or draft.tensors[x].ndim < 2 for x in (a, b)):
        return "no pair left"
    rank = draw(st.integers(0, 6))
    draft.tensors[a] = draft.tensors[a][:rank].clone()
    draft.tensors[b] = draft.tensors[b][:, :rank].clone()
    stated = draw(st.booleans())
    for _, root in draft.documents() if stated else ():
        if isinstance(root, dict) and isinstance(root.get("rank_pattern"), dict):
            root["rank_pattern"] = {f"^{path.removeprefix(PREFIX)}": rank, **root["rank_pattern"]}
    return f"{path}: rank {rank}, {'stated' if stated else 'not stated'}"


# ---------------------------------------------------------------- damage to names

SPELLINGS = {
    "bare": lambda n: n.removeprefix(PREFIX),
    "wrapped": lambda n: f"{PREFIX}{n}",
    "no wrapper": lambda n: n.replace("model.layers", "layers"),
    "trunk": lambda n: n.replace("model.layers", "model.language_model.layers"),
    "text_model": lambda n: n.replace("text_encoder.", "text_encoder.text_model."),
    "no weight": lambda n: n.removesuffix(".weight"),
    "weight": lambda n: f"{n}.weight",
    "adapter name": lambda n: n.replace(".weight", ".default.weight"),
    "kohya": lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "other factor": lambda n: n.replace("lora_A", "lora_B"),
    "other layer": lambda n: n.replace("layers.0", "layers.1"),
    "no layer": lambda n: n.replace("layers.0", "layers.7"),
    "digit": lambda n: n.replace("layers.0", "layers.\u0660"),
    "zero": lambda n: n.replace("layers.0", "layers.00"),
    "base": lambda n: n.partition(".lora_")[0] + ".weight",
    "copy": lambda n: n.partition(".lora_")[0] + ".base_layer.weight",
    "nest": lambda n: n.replace(".lora_", ".base_layer.lora_"),
    "head": lambda n: f"{PREFIX}lm_head.weight",
    "saved": lambda n: n.replace("classifier", "classifier.modules_to_save.default"),
    "upper": str.upper,
    "typo": lambda n: n.replace("_proj", "_prj"),
    "shorter": lambda n: n[:-1],
    "dot": lambda n: f"{n}.",
    "dots": lambda n: n.replace(".", ".."),
    "slash": lambda n: n.replace(".", "/"),
    "path": lambda n: f"../../{n}",
    "nul": lambda n: f"{n}\0",
    "look-alike": lambda n: n.replace("a", "\u0430"),
    "surrogate": lambda n: f"{n}\ud800",
    "expression": lambda n: n.replace("q_proj", "(q+)+$"),
    "long": lambda n: f"{n}{'.x' * 5000}",
    "empty": lambda n: "",
    "metadata": lambda n: "__metadata__",
}


def damage_names(draw, draft):
    """Renames, copies, removes or swaps tensors."""
    if not draft.tensors:
        return "no tensor left"
    name = draw(_pool(sorted(draft.tensors)))
    action = draw(_pool(["rename", "rename all", "copy", "drop", "swap"]))
    if action == "drop":
        del draft.tensors[name]
        return f"{name}: drop"
    if action == "swap":
        other = draw(_pool(sorted(draft.tensors)))
        held = draft.tensors
        held[name], held[other] = held[other], held[name]
        return f"{name}: swap with {other}"
    spelling = draw(_pool(list(SPELLINGS)))
    chosen = sorted(draft.tensors) if action == "rename all" else [name]
    held = {n: draft.tensors[n] for n in chosen}
    if action != "copy":
        draft.tensors = {n: t for n, t in draft.tensors.items() if n not in held}
    draft.tensors |= {SPELLINGS[spelling](n): t for n, t in held.items()}
    return f"{name}: {action} {spelling}"


# ---------------------------------------------------------------- damage to the container


def damage_header(draw, layout):
    """Changes the entry of one tensor: dtype, shape, place."""
    names = [n for n, e in layout.header.items() if n != "__metadata__" and isinstance(e, dict)]
    if not names:
        return "no entry left"
    name = draw(_pool(names))
    entry = layout.header[name]
    action = draw(_pool(["dtype", "shape", "offsets", "swap", "drop", "entry", "same place"]))
    other = layout.header[draw(_pool(names))]
    if action == "drop":
        del layout.header[name]
    elif action == "swap":
        layout.header[name], entry = other, layout.header[name]
        layout.header[next(n for n, e in layout.header.items() if e is other)] = entry
    elif action == "same place":
        entry["data_offsets"] = copy.deepcopy(other.get("data_offsets"))
    elif action == "entry":
        key = draw(_pool([*entry, "extra"]))
        entry.pop(key, None)
        if draw(st.booleans()):
            entry[key] = draw(VALUES)
    elif action == "dtype":
        entry["dtype"] = draw(_pool([*DTYPES, "F4", "C64", "U16", "f32", "", None, 5, ["F32"]]))
    elif isinstance(entry.get(key := {"shape": "shape"}.get(action, "data_offsets")), list):
        _sizes(draw, entry[key])
    return f"{name[:80]}: {action} {layout.header.get(name)}"[:200]


def _sizes(draw, sizes):
    action = draw(_pool(["set", "add", "swap", "shift", "split"]))
    at = draw(st.integers(0, max(0, len(sizes) - 1)))
    if action == "add" or not sizes:
        sizes.insert(at, draw(_pool(SIZES)))
    elif action == "set":
        sizes[at] = draw(_pool(SIZES))
    elif action == "swap":
        sizes.reverse()
    elif isinstance(sizes[at], int) and action == "shift":
        sizes[at] += draw(_pool([-8, -4, -1, 1, 4, 8, 64]))
    elif isinstance(sizes[at], int) and sizes[at] % 2 == 0:
        sizes[at : at + 1] = [2, sizes[at] // 2]


def damage_text(draw, text):
    """Writes a key of a JSON text twice, or what is no strict JSON."""
    value = json.dumps(draw(VALUES))
    known = [k for k in json.loads(text) if isinstance(k, str)]
    key = json.dumps(draw(_pool([*known, *KEYS])))
    ways = [
        text.replace("{", f"{{{key}: {value}, ", 1),
        text.replace("{", "{" * 2, 1),
        text.replace("}", ",}", 1),
        f"{text}{value}",
        text[: len(text) // 2],
        f"\ufeff{text}",
        text.replace('"', "'"),
        value,
        "",
    ]
    return draw(_pool(ways)), f"text with {key[:40]}: {value[:60]}"


def damage_bytes(draw, data):
    """Flips, cuts, appends or repeats bytes, more often in the header than behind it."""
    action = draw(_pool(["flip", "flip", "length", "cut", "append", "insert", "repeat"]))
    end = draw(_pool([8, 8 + int.from_bytes(data[:8], "little"), len(data)]))
    at = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
    extra = bytes(draw(st.lists(st.integers(0, 255), min_size=1, max_size=9)))
    if action == "length":
        length = int.from_bytes(data[:8], "little")
        near = [length + n for n in (-9, -8, -1, 1, 8, 9)]
        new = max(0, draw(_pool([*near, 0, 1, 2**31, 2**63, 2**64 - 1])))
        data = new.to_bytes(8, "little") + data[8:]
    elif action == "flip":
        data = data[:at] + bytes([data[at] ^ (extra[0] or 1)]) + data[at + 1 :] if data else data
    else:
        data = {
            "cut": data[:at],
            "append": data + extra,
            "insert": data[:at] + extra + data[at:],
            "repeat": data[:at] + data[max(0, at - 64) :],
        }[action]
    return data, f"bytes at {at}: {action} {extra.hex()}"


# ---------------------------------------------------------------- cases

EARLY = {
    "json": damage_json,
    "metadata": damage_metadata,
    "values": damage_values,
    "names": damage_names,
}
# JSON has the most ways to be wrong, and a container that is broken hides what lies behind
PARTS = [*["json"] * 5, *["values", "names"] * 2, "metadata", "header", "text", "bytes"]


@st.composite
def cases(draw):
    """Draws a good file and one to four damages to it."""
    good, foreign = draw(_pool(list(GOOD))), draw(st.booleans())
    draft = draft_of(good, foreign)
    chosen = draw(st.lists(_pool(PARTS), min_size=1, max_size=4))
    log = [EARLY[part](draw, draft) for part in chosen if part in EARLY]
    layout = laid_out(draft)
    log += [damage_header(draw, layout) for part in chosen if part == "header"]
    texts = {"header": dumped(layout.header)}
    if draft.config is not None:
        texts["config"] = dumped(draft.config)
    for part in chosen:
        if part == "text":
            which = draw(_pool(list(texts)))
            with suppress(ValueError, TypeError, RecursionError):  # it is broken already
                texts[which], said = damage_text(draw, texts[which])
                log.append(f"{which}: {said}")
    weights, config = packed(texts["header"], layout.data), texts.get("config")
    beside = None if config is None else config.encode("utf-8", "surrogatepass")
    for part in chosen:
        if part == "bytes" and beside is not None and draw(st.integers(0, 3)) == 0:
            beside, said = damage_bytes(draw, beside)
            log.append(f"config: {said}")
        elif part == "bytes":
            weights, said = damage_bytes(draw, weights)
            log.append(said)
    restate = bool(draft.metadata.get(MANIFEST)) and draw(st.booleans())
    name = f"{good}, {'foreign' if foreign else 'ours'}"
    return Case(name, weights, beside, restate, tuple(log), tuple(sorted(set(chosen))))
