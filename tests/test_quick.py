"""The selection of `make test-fast`."""

import ast
from pathlib import Path

import pytest
import quick

TESTS = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in (TESTS.parent / "resnet_flax").glob("*/__init__.py"))


def _functions(file):
    """The tests of a file that `make test` runs, in the form of the list of slow ones."""
    for node in ast.parse(file.read_text()).body:
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test and "pytest.mark.long" not in map(ast.unparse, node.decorator_list):
            yield f"{file.relative_to(TESTS.parent)}::{node.name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_has_quick_tests(package):
    functions = {f for file in (TESTS / package).glob("test_*.py") for f in _functions(file)}
    assert functions - quick.listed()


def test_the_listed_tests_are_there():
    assert [name for name in sorted(quick.listed()) if not quick.there(name)] == []


def test_parameters_and_gone_tests_are_not_listed():
    assert quick.function_of("tests/test_quick.py::test_a[b-[c]]") == "tests/test_quick.py::test_a"
    assert quick.there("tests/test_quick.py::test_parameters_and_gone_tests_are_not_listed")
    assert not quick.there("tests/test_quick.py::test_gone")
    assert not quick.there("tests/test_gone.py::test_gone")
