"""The benchmarks run, in their shortest form; what they time is judged nowhere here."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu's wheel: jax[tpu]")
@pytest.mark.parametrize("fsdp", [1, 4])
def test_tpu_s_compiler_takes_the_step(tmp_path, fsdp):
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/tpu_ahead_of_time.py", f"--fsdp={fsdp}", f"--out={out}"]
    command += ["--config=configs/cifar10.py:resnet20", "--image_size=32", "--classes=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())
    assert found["mesh"] == {"data": 8 // fsdp, "fsdp": fsdp}
    reduced = found["collectives"]["all-reduce"]["largest"]
    # Of ResNet-20's kernels the largest; under FSDP none is reduced whole.
    assert reduced == 3 * 3 * 64 * 64 if fsdp == 1 else reduced < 3 * 3 * 64 * 64 / fsdp * 2
