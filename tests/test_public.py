"""The public surface: what `import resnet_flax` offers, at each access and to type checkers."""

import subprocess
import sys
from pathlib import Path

import pytest

import resnet_flax

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", resnet_flax.__all__)
def test_a_public_name_is_the_same_at_each_access(name):
    first = getattr(resnet_flax, name)
    # Its module is imported by now: a subpackage of that name would have taken its place.
    assert getattr(resnet_flax, name) is first
    assert dir(resnet_flax).count(name) == 1
    assert name == "data" or not (ROOT / "resnet_flax" / name).exists()


def test_a_second_training_in_one_process_works(config, tmp_path):
    config.steps = 2
    config.optim.warmup_steps = 1
    for workdir in ("first", "second"):
        result = resnet_flax.train(config, tmp_path / workdir)
        assert result.count == 360


def test_a_type_checker_sees_the_types_of_public_names(tmp_path):
    names = [name for name in resnet_flax.__all__ if name != "data"]
    names += [f"data.{name}" for name in resnet_flax.data.__all__]
    program = "import resnet_flax\n" + "".join(f"reveal_type(resnet_flax.{n})\n" for n in names)
    program += "resnet_flax.tarin\n"
    (tmp_path / "user.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", str(tmp_path / "user.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names), done.stdout + done.stderr
    assert not [line for line in revealed if 'is "Any"' in line]
    assert 'Module has no attribute "tarin"' in done.stdout


def test_the_version_is_that_of_the_package(capsys):
    from resnet_flax.cli import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"resnet-flax {resnet_flax.__version__}\n"
