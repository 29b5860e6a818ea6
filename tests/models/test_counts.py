"""The table of `resnet-flax models` is complete, right, and read without JAX.

`test_variants.py` counts every network again and compares it with the table.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from resnet_flax import VARIANTS
from resnet_flax.cli import main
from resnet_flax.models import counts
from resnet_flax.weights.catalog import CATALOG

ROOT = Path(__file__).parents[2]
MEND = "python -m resnet_flax.models.counts writes the table"


def test_every_network_has_a_row_and_every_row_is_of_a_network():
    assert list(counts.stored()) == list(VARIANTS), MEND


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_plain8", "resnet18", "seresnet18"])
def test_a_row_is_what_is_counted(name):
    assert counts.stored()[name] == counts.count(name), MEND


def test_the_table_is_written_as_it_is_read(tmp_path, monkeypatch):
    few = {name: VARIANTS[name] for name in ("cifar_resnet8", "resnet18")}
    monkeypatch.setattr(counts, "VARIANTS", few)
    counts.write(tmp_path / "counts.json")
    lines = (tmp_path / "counts.json").read_text().splitlines()
    committed = counts.FILE.read_text().splitlines()
    assert {line.rstrip(",") for line in lines} <= {line.rstrip(",") for line in committed}
    assert len(lines) == 4


def test_a_network_without_a_row_is_counted(capsys, monkeypatch):
    monkeypatch.setitem(VARIANTS, "mine", VARIANTS["cifar_resnet8"])
    assert main(["models", "mine"]) == 0
    mine = capsys.readouterr().out.splitlines()[1].split()
    assert main(["models", "cifar_resnet8"]) == 0
    assert mine == ["mine", *capsys.readouterr().out.splitlines()[1].split()[1:]]


@pytest.mark.parametrize(
    ("flags", "names"), [([], VARIANTS), (["--published"], CATALOG)], ids=["networks", "published"]
)
def test_listing_names_imports_no_jax(flags, names):
    code = f"""
import sys
from resnet_flax.cli import main
assert main(["models", *{flags}]) == 0
slow = {{"jax", "flax", "numpy", "ml_collections"}} & {{*sys.modules}}
assert not slow, slow
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["name", *names]
