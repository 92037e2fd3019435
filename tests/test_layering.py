"""The import direction of the package, and where private APIs, Triton and the environment may be
touched, from the sources' syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file may import from earlier layers and, in a layer of several files, only where PEERS says so.
LAYERS = (
    ("compat", "formats", "rotation", "region", "device", "philox", "shapes"),
    ("reference", "codec", "rules", "profile", "seeds"),
    ("encode", "published", "statistics"),
    ("observation", "fakes"),
    ("ops", "recipe_text", "recipe_table", "error"),
    ("graph", "selectors"),
    (
        "basis",
        "rewrite",
        "recompute",
        "partition",
        "packing",
        "encoded_nodes",
        "producers",
        "traffic",
        "cost",
        "recipes",
    ),
    ("config", "plan", "verify", "selection", "fitting", "auto", "parts", "operands"),
    ("sides",),
    ("reports", "encoded_gemms", "alternatives"),
    ("dump",),
    ("passes", "codegen"),
    ("measurement",),
    ("backend", "comparison"),
    ("explanation",),
    ("calibration",),
    ("__init__",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PEERS = {("formats", "rotation"), ("traffic", "producers"), ("operands", "plan")}
PRIVATE = ("torch._inductor", "torch._dynamo", "torch._functorch")
TRITON_FREE = ("rotation", "formats", "reference", "ops", "region", "plan", "recipes", "graph")
SOURCES = sorted(
    path for folder in ("hadagraph", "passes", "codegen") for path in (ROOT / folder).glob("*.py")
)


def layer_of(path: Path) -> str:
    return path.stem if path.parent.name == "hadagraph" else path.parent.name


def imports(tree: ast.AST) -> list[str]:
    """Every imported module, in functions and under TYPE_CHECKING too, as dotted names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def own_layers(names: list[str]) -> set[str]:
    """The layers of hadagraph that these imports reach."""
    layers = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "hadagraph":
            layers.add(parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__")
    return layers


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


every_source = pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}"
)


def violations(layer: str, names: list[str]) -> set[str]:
    return {
        other
        for other in own_layers(names) - {layer}
        if LEVEL[other] >= LEVEL[layer] and (layer, other) not in PEERS
    }


@every_source
def test_imports_go_one_way(path):
    assert layer_of(path) in LEVEL, "a new file: give it a layer"
    assert not violations(layer_of(path), imports(tree_of(path)))


def test_a_wrong_import_would_be_found():
    assert violations("ops", ["hadagraph.graph.create"]) == {"graph"}
    assert violations("passes", ["hadagraph.codegen.launch"]) == {"codegen"}
    assert violations("codegen", ["hadagraph.passes"]) == {"passes"}
    assert violations("graph", ["hadagraph.ops", "hadagraph"]) == {"__init__"}
    assert not violations("formats", ["hadagraph.rotation.Rotation"])
    assert violations("rotation", ["hadagraph.formats.FORMATS"]) == {"formats"}


def test_passes_do_not_know_each_other():
    for path in (ROOT / "passes").glob("*.py"):
        if path.name != "__init__.py":
            names = imports(tree_of(path))
            assert not [name for name in names if is_under(name, "hadagraph.passes")], path


@pytest.mark.parametrize("folder", ["hadagraph", "passes", "codegen", "tests", "examples", "bench"])
def test_nothing_loads_a_second_copy_of_passes_or_codegen(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if "golden" not in path.parts:
            bad = [n for n in imports(tree_of(path)) if n.split(".")[0] in ("passes", "codegen")]
            assert not bad, f"{path} imports {bad}: say hadagraph.passes, hadagraph.codegen"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@every_source
def test_private_torch_is_touched_in_compat_only(path):
    tree = tree_of(path)
    used = imports(tree) + [dotted(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    private = {name for name in used for package in PRIVATE if is_under(name, package)}
    assert not private or path.name == "compat.py"


@pytest.mark.parametrize("stem", TRITON_FREE)
def test_the_references_need_no_triton(stem):
    names = imports(tree_of(ROOT / "hadagraph" / f"{stem}.py"))
    assert not [name for name in names if is_under(name, "triton")]


def reads_hadagraph_variables(path: Path) -> bool:
    constants = [n.value for n in ast.walk(tree_of(path)) if isinstance(n, ast.Constant)]
    return any(isinstance(value, str) and value.startswith("HADAGRAPH_") for value in constants)


def test_the_environment_is_read_in_one_place():
    readers = {layer_of(path) for path in SOURCES if reads_hadagraph_variables(path)}
    assert readers == {"config"}
