"""The test vectors: two readers that share no code, and the program that made them, agree."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hf_lora import open_adapter
from hf_lora.errors import LoraError
from hf_lora.fingerprint import Fingerprint, positions
from hf_lora.formats.container import read_safetensors
from hf_lora.limits import DEFAULT_LIMITS
from hf_lora.paths import canonical_names
from hf_lora.verdict import compare as compare_with_hf_lora
from tests import fingerprint_reader, format_reader
from tests.fingerprint_reader import bf16, compare, fingerprint_of, fp16, read_fingerprint, short_id
from tests.vectors import make
from tests.vectors.spoilt import packed

ROOT = Path(__file__).parent
VECTORS = ROOT / "vectors"
EXPECTED = json.loads((VECTORS / "expected.json").read_text("utf-8"))
ADAPTERS, REFUSED = EXPECTED["adapters"], EXPECTED["refused"]
PRINTS = json.loads((VECTORS / "fingerprints.json").read_text("utf-8"))
PAIRS = [
    (s, h, verdict) for s, row in EXPECTED["comparisons"].items() for h, verdict in row.items()
]
EQUAL = [
    ("patterns", "patterns_widened"),
    ("plain", "foreign"),
    ("plain", "config_disagrees"),
    ("dora", "foreign_dora"),
    ("vision_language", "vision_language_older"),
    ("pipeline.safetensors", "pipeline_text_model.safetensors"),
]
UNEQUAL = [("plain", "doubles"), ("plain", "halves"), ("patterns", "rslora")]


def read(name):
    """Reads a vector by the page alone, its fingerprints included."""
    adapter = format_reader.read_adapter(VECTORS / name)
    prints = ((adapter.manifest or {}).get("base") or {}).get("fingerprints", {})
    for fingerprint in prints.values():
        read_fingerprint(fingerprint)
    return adapter, prints


def found_by_page(name):
    adapter, prints = read(name)
    components = {}
    for part, held in adapter.components.items():
        spelt, modules = map(format_reader.canonical_paths, (held.targets, held.modules))
        scalings = format_reader.scalings(held)
        components[part] = {
            "scalings": {spelt[path]: scalings[path] for path in held.targets},
            "modules": {modules[path]: sorted(held.modules[path]) for path in held.modules},
        }
    owned = ("hf_lora", "format", "lora_adapter_metadata")
    return {
        "layout": adapter.layout,
        "digest": format_reader.digest(adapter.components),
        "components": components,
        "fingerprints": {part: short_id(fingerprint) for part, fingerprint in prints.items()},
        "metadata": {key: text for key, text in adapter.metadata.items() if key not in owned},
        "foreign": adapter.manifest is None,
        "differing": adapter.differing,
    }


def found_by_hf_lora(name):
    adapter = open_adapter(VECTORS / name)
    manifest, components = adapter.manifest, {}
    for part, held in adapter.components.items():
        spelt, modules = canonical_names(held.targets), canonical_names(held.modules)
        lora = held.kind == "LORA"
        components[part] = {
            "scalings": {spelt[p]: held.scaling(p) if lora else None for p in held.targets},
            "modules": {modules[path]: sorted(held.modules[path]) for path in held.modules},
        }
    repairs = [] if name == "foreign_pipeline.safetensors" else adapter.repairs  # says alpha = rank
    return {
        "layout": "diffusers" if name.endswith(".safetensors") else "peft",
        "digest": adapter.digest,
        "components": components,
        "fingerprints": {part: f.short for part, f in manifest.base.fingerprints.items()},
        "metadata": dict(manifest.foreign),
        "foreign": not manifest.digest,
        "differing": [repair.split()[0] for repair in repairs],
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_reader_of_the_page_finds_what_is_expected(name):
    assert found_by_page(name) == ADAPTERS[name]


@pytest.mark.parametrize("name", ADAPTERS)
def test_hf_lora_finds_what_is_expected(name):
    assert found_by_hf_lora(name) == ADAPTERS[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_reader_of_the_page_refuses_what_must_be_refused(name):
    with pytest.raises(format_reader.Refused) as caught:
        read(name)
    assert str(caught.value) == REFUSED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_hf_lora_refuses_what_must_be_refused(name):
    with pytest.raises(LoraError) as caught:
        open_adapter(VECTORS / name)
    assert caught.value.field == REFUSED[name]


@pytest.mark.parametrize("name", ADAPTERS)
def test_safetensors_reads_the_same_values(name):
    file = VECTORS / name / "adapter_model.safetensors"
    ours = read(name)[0].tensors
    with safe_open(VECTORS / name if name.endswith(".safetensors") else file, "pt") as theirs:
        assert set(theirs.keys()) == set(ours)
        for key, values in ours.items():
            tensor = theirs.get_tensor(key)
            narrow = tensor.is_floating_point() and tensor.element_size() < 8
            assert np.array_equal((tensor.float() if narrow else tensor).numpy(), values)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_mathematics_have_equal_digests(one, other):
    assert ADAPTERS[one]["digest"] == ADAPTERS[other]["digest"]


@pytest.mark.parametrize(("one", "other"), UNEQUAL)
def test_other_values_have_other_digests(one, other):
    assert ADAPTERS[one]["digest"] != ADAPTERS[other]["digest"]


@pytest.mark.parametrize("name", PRINTS)
def test_both_readers_find_the_short_id(name):
    read_fingerprint(PRINTS[name])
    ids = {short_id(PRINTS[name]), Fingerprint.from_json(PRINTS[name]).short}
    assert ids == {EXPECTED["fingerprints"][name]}


@pytest.mark.parametrize("count", [1, 31, 32, 33, 46, 47, 1000, 4_000_000_007, (1 << 63) - 1])
def test_both_readers_sample_the_same_positions(count):
    assert fingerprint_reader.positions(count) == positions(count)


def test_both_readers_take_every_byte_but_zero_for_true(tmp_path):
    data = packed({"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\2")
    (tmp_path / "x").write_bytes(data)
    values = read_safetensors(tmp_path / "x", DEFAULT_LIMITS).tensors["x"].tolist()
    assert format_reader.read_container(data)[0]["x"].tolist() == values == [False, True, True]


@pytest.mark.parametrize(
    ("name", "casts"),
    [("fp32", ()), ("bf16", (bf16,)), ("fp16", (fp16,)), ("fp16_bf16", (fp16, bf16))],
)
def test_the_page_samples_the_same_values_of_the_base(name, casts):
    weights, _ = format_reader.read_container((VECTORS / "base.safetensors").read_bytes())
    for cast in casts:
        weights = {n: cast(w) if w.dtype == np.float32 else w for n, w in weights.items()}
    assert fingerprint_of(weights) == PRINTS[name]


@pytest.mark.parametrize(("stored", "host", "verdict"), PAIRS)
def test_both_readers_compare_alike(stored, host, verdict):
    assert compare(read_fingerprint(PRINTS[stored]), read_fingerprint(PRINTS[host])) == verdict
    ours, theirs = Fingerprint.from_json(PRINTS[stored]), Fingerprint.from_json(PRINTS[host])
    assert compare_with_hf_lora(ours, theirs).state == verdict


def test_every_verdict_occurs():
    assert {verdict for _, _, verdict in PAIRS} == {
        "matched",
        "rounded",
        "mismatched",
        "unverified",
    }


def broken_fingerprints():
    good = PRINTS["few_bf16"]["tensors"]
    name, entry = next(iter(good.items()))
    changes = {
        "version": {"version": 2, "tensors": good},
        "field": {"version": 1, "tensors": good, "more": 1},
        "both spellings": {"version": 1, "tensors": {name: entry | {"fp32": entry["bf16"]}}},
        "shape": {"version": 1, "tensors": {name: entry | {"shape": [40]}}},
        "size": {"version": 1, "tensors": {name: entry | {"shape": [40, 0]}}},
        "count": {"version": 1, "tensors": {name: entry | {"shape": [2, 2]}}},
        "base64": {"version": 1, "tensors": {name: entry | {"bf16": "%"}}},
        "name": {"version": 1, "tensors": {"line\n": entry}},
    }
    return changes.items()


@pytest.mark.parametrize(("what", "value"), broken_fingerprints())
def test_both_readers_refuse_a_broken_fingerprint(what, value):
    with pytest.raises(format_reader.Refused, match="fingerprint"):
        read_fingerprint(value)
    with pytest.raises(LoraError) as caught:
        Fingerprint.from_json(value)
    assert caught.value.field == "fingerprint"


def test_the_page_rounds_as_torch_does():
    patterns = np.random.RandomState(0).randint(0, 1 << 32, 100_000, dtype=np.uint64)
    values = patterns.astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    tensor, same = torch.from_numpy(values), fingerprint_reader.same
    assert same(bf16(values), tensor.bfloat16().float().numpy()).all()
    assert same(fp16(values), tensor.half().float().numpy()).all()
    small = values[np.abs(values) < 448]  # beyond, versions of torch differ
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        table = format_reader.FLOAT8[name]
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
        assert same(table, codes).all()
        ours = fingerprint_reader.to_float8(small, table)
        assert same(ours, torch.from_numpy(small).to(dtype).float().numpy()).all()


def files_of(folder):
    paths = (p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_the_vectors_are_made_again_byte_for_byte(tmp_path):
    make.write(tmp_path)
    assert files_of(tmp_path) == files_of(VECTORS)


def imported(path):
    """Returns the top packages that a file imports, `tests.NAME` for one of ours."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module if node.module.startswith("tests.") else node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


def test_the_readers_of_the_page_use_nothing_but_python_and_numpy():
    readers = [Path(module.__file__) for module in (format_reader, fingerprint_reader)]
    names = {name for path in readers for name in imported(path)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "tests.format_reader"}
    assert not names & {"importlib", "subprocess"}
