"""`import hf_lora` costs nothing and shows what there is."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "diffusers", "accelerate", "numpy", "safetensors")


def loaded_by(code):
    """Returns the names of the modules a fresh interpreter holds after the code."""
    report = "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_import_loads_no_heavy_library():
    assert not loaded_by("import hf_lora") & set(HEAVY)


def test_listing_the_names_loads_no_heavy_library():
    assert not loaded_by("import hf_lora; dir(hf_lora); hf_lora.__all__") & set(HEAVY)


def test_roles_and_errors_load_no_torch():
    assert "torch" not in loaded_by("import hf_lora.roles, hf_lora.errors")


def test_dir_lists_every_public_name():
    import hf_lora

    assert set(hf_lora.__all__) <= set(dir(hf_lora))


def test_every_public_name_resolves():
    import hf_lora

    assert [name for name in hf_lora.__all__ if getattr(hf_lora, name).__name__ != name] == []


def test_unknown_name_is_an_attribute_error():
    import hf_lora

    with pytest.raises(AttributeError, match="no attribute 'attach_loras'"):
        _ = hf_lora.attach_loras
