"""Imports point inwards, in the layers listed here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "resnet_flax").rglob("*.py"))

# From the innermost outwards; a name includes all modules below it that have no row of their own. A
# module imports only from inner rows, or from its own row and package.
LAYERS = (
    ("errors",),
    ("keys", "renamed"),
    ("schema", "combinations", "unknown_keys"),
    ("runtime", "ops"),
    ("config", "sharding"),
    ("models", "data"),
    ("evaluation",),
    ("tasks", "training"),
    ("weights",),
    ("apply",),
    ("", "sweep", "paper"),
    ("cli",),
    ("__main__",),
)


def _layer(module: str) -> int:
    """The row of a module, written without 'resnet_flax.', by its longest listed name."""
    listed = {name: row for row, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in listed:
            return listed[".".join(parts[:end])]
    raise AssertionError(f"{module} is in no layer")


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT / "resnet_flax").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {_module(path) for path in FILES}
    ours = {name.removeprefix("resnet_flax.") for name in found if name.startswith("resnet_flax.")}
    return ours & modules


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_imports_point_inwards(file):
    module = _module(file)
    package = module.partition(".")[0]
    outwards = {
        name
        for name in _imports(file)
        if _layer(name) > _layer(module)
        or (_layer(name) == _layer(module) and name.partition(".")[0] != package)
    }
    assert outwards == set()


def test_every_layer_is_there():
    packages = {module.partition(".")[0] for module in map(_module, FILES)}
    assert {name for row in LAYERS for name in row} == packages


def test_operations_know_jax_alone_and_networks_no_config():
    for file in FILES:
        package = _module(file).partition(".")[0]
        if package == "ops":
            assert not {name.split(".")[0] for name in _names(file)} & {"flax", "ml_collections"}
        if package == "models":
            assert not {name.partition(".")[0] for name in _imports(file)} & {"config", "sharding"}


def test_only_sharding_names_a_mesh_axis():
    for file in FILES:
        if _module(file) != "sharding":
            assert "PartitionSpec(" not in file.read_text(), file


def test_no_tensorflow():
    for file in FILES:
        assert not any(name.split(".")[0] == "tensorflow" for name in _names(file)), file


def _names(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module
    }
