"""Imports point one way: a room imports only from the rows below it (docs/design.md, section 4).

Every import is read from the source, those inside functions too. Under TYPE_CHECKING a module may
also name the types of a neighbour in its own row, which runs nothing; never those of a row above.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import hf_lora

PACKAGE = Path(__file__).parent.parent / "hf_lora"
# From the top down. Within a row the left may import the right, which keeps a row free of cycles.
ROWS = (
    ("cli", "convert", "demo", "demo_hub", "demo_images", "demo_styles", "bake", "verify"),
    ("serving", "training"),
    ("hub",),
    (
        "probe",
        "recognise",
        "findings",
        "facts",
        "rehearsal",
        "load",
        "exchange",
        "save",
        "report",
        "fit",
        "spelling",
        "fields",
        "slots",
        "attach",
        "switch",
        "merge",
        "inject",
        "overrides",
        "merged",
        "siblings",
    ),
    ("fetch", "client", "skeletons", "architectures"),
    ("layers",),
    (
        "plan",
        "planned",
        "components",
        "prepared",
        "render",
        "choose",
        "select",
        "joined",
        "base",
        "configs",
        "targets",
        "quantised",
        "record",
        "casting",
        "offload",
        "hosts",
        "walks",
    ),
    ("formats",),
    ("algebra",),
    ("adapter", "manifest", "verdict", "fingerprint", "digest", "patterns", "paths", "limits"),
    ("families", "rows", "fused", "roles", "lexicon"),
    ("testing",),
    ("errors", "progress"),
)
STRANGERS = {"serving", "training"}  # may not import each other
RUN_TIME = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "peft",
    "safetensors",
    "torch",
    "transformers",
}
# Packages of an optional extra, and the only rooms that may import them (inside functions).
OPTIONAL = {
    "PIL": {"demo_images", "demo_styles", "training"},
    "gguf": {"demo"},
    "matplotlib": {"demo", "training"},
    "yaml": {"training"},
}


def room_of(module):
    """`hf_lora.formats.peft` lies in the room `formats`, `hf_lora` in ``.

    A public name lies in the room that the package takes it from: `hf_lora.load_lora` in `load`.
    """
    name = module.split(".")[1] if "." in module else ""
    return hf_lora._HOME.get(name, name)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def inner_nodes(tree, kinds):
    """Returns the ids of all nodes below a node for which `kinds` holds."""
    return {id(node) for top in ast.walk(tree) if kinds(top) for node in ast.walk(top)}


def is_function(node):
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@dataclass(frozen=True)
class Import:
    """One imported module: by which module, where, and whether at call time or for types only."""

    module: str
    line: int
    name: str
    in_function: bool = False
    types_only: bool = False

    def __str__(self):
        return f"{self.module}:{self.line} imports {self.name}"


def imports_of(tree, module, is_package):
    """Yields an Import for every module that an import statement of the tree names."""
    inside, types = inner_nodes(tree, is_function), inner_nodes(tree, is_types_only)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            # `from hf_lora import plan` imports the room, not a name of the package
            names = [f"{base}.{n.name}" for n in node.names] if base == "hf_lora" else [base]
        for name in names:
            yield Import(module, node.lineno, name, id(node) in inside, id(node) in types)


def all_imports():
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from imports_of(tree, module, path.name == "__init__.py")


def height(room):
    """Returns (row, place in the row), smaller is higher; None when the design has no such room."""
    for row, rooms in enumerate(ROWS):
        if room in rooms:
            return row, rooms.index(room)
    return None


def may_import(room, other, types_only=False):
    if room == other or room in ("", "__main__"):  # the lazy facade, and `python -m hf_lora`
        return True
    if other == "":  # a room may read the version, nothing comes back from above
        return room in ("cli", "demo")
    if height(room) is None or height(other) is None or {room, other} == STRANGERS:
        return False
    if types_only and height(room)[0] == height(other)[0]:
        return True
    return height(room) < height(other)


def test_every_module_has_its_row():
    rooms = {room_of(module) for module, _ in modules()} - {"", "__main__"}
    assert not [room for room in rooms if height(room) is None]


def test_a_module_imports_only_from_rows_below():
    wrong = [
        str(found)
        for found in all_imports()
        if found.name.split(".")[0] == "hf_lora"
        and found.name != "hf_lora.__version__"
        and not may_import(room_of(found.module), room_of(found.name), found.types_only)
    ]
    assert not wrong


def test_only_run_time_packages_and_listed_extras_are_imported():
    wrong = []
    for found in all_imports():
        top = found.name.split(".")[0]
        if top in sys.stdlib_module_names or top == "hf_lora" or top in RUN_TIME:
            continue
        if not (found.in_function and room_of(found.module) in OPTIONAL.get(top, ())):
            wrong.append(str(found))
    assert not wrong


def test_roles_and_errors_stand_on_the_standard_library():
    used = {
        found.name.split(".")[0]
        for found in all_imports()
        if room_of(found.module) in ("roles", "errors")
    }
    assert not used & RUN_TIME


@pytest.mark.parametrize(
    ("room", "other", "allowed"),
    [
        ("plan", "errors", True),
        ("errors", "plan", False),
        ("load", "attach", True),
        ("attach", "load", False),
        ("serving", "training", False),
        ("training", "serving", False),
        ("training", "attach", True),
        ("adapter", "", False),
        ("somewhere", "errors", False),
    ],
)
def test_the_rule_itself(room, other, allowed):
    assert may_import(room, other) is allowed


def test_types_of_a_neighbour_may_be_named_but_none_from_above():
    assert may_import("render", "plan", types_only=True)
    assert not may_import("render", "plan")
    assert not may_import("errors", "plan", types_only=True)


def test_imports_inside_functions_and_relative_ones_are_seen():
    source = (
        "def f():\n    from . import plan\n    from ..attach import attach_lora\n"
        "if TYPE_CHECKING:\n    import torch\n"
    )
    found = set(imports_of(ast.parse(source), "hf_lora.formats", is_package=True))
    assert found == {
        Import("hf_lora.formats", 2, "hf_lora.formats", in_function=True),
        Import("hf_lora.formats", 3, "hf_lora.attach", in_function=True),
        Import("hf_lora.formats", 5, "torch", types_only=True),
    }
