"""The benchmarks run, in their shortest form; their timings are not checked."""

import importlib
import json
import os
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
    # The largest of ResNet-20's kernels; under FSDP none is all-reduced completely.
    assert reduced == 3 * 3 * 64 * 64 if fsdp == 1 else reduced < 3 * 3 * 64 * 64 / fsdp * 2


@pytest.mark.long
def test_sessions_go_on_from_each_other(tmp_path, data_dir):
    keep = tmp_path / "keep"
    command = [sys.executable, "benchmarks/table6_session.py", f"--keep={keep}", "--seeds=1"]
    command += [f"--data_dir={data_dir}", "--config.data.source=tfds:digits"]
    command += ["--config.data.pad=1", "--config.log.every=20", "--config.steps_per_dispatch=20"]
    command += ["--config.batch_size=32", "--config.eval.every=1000"]

    def sit(*flags):
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    short = ("--config.steps=40", "--config.optim.boundaries=20")
    assert sit("--only=plain-20", *short)[0] == 0
    long = ("--config.steps=4000", "--config.optim.boundaries=20")
    status, printed = sit("--only=ResNet-20", "--minutes=0.3", *long)
    assert status == 143, printed
    # Elsewhere, with the files that were kept: the first is finished, the second continues.
    status, printed = sit("--only=plain-20", *short)
    assert "1 training run, finished" in printed, printed
    status, printed = sit("--only=ResNet-20", "--minutes=0.3", *long)
    assert "continues at step" in printed, printed
    rows = {run["row"] for run in json.loads((keep / "table6.json").read_text())}
    assert rows == {"plain-20"}


HLO = """
%fused_add (a: f32[4,8]) -> f32[4,8] {
  ROOT %add = f32[4,8]{1,0} add(%a, %a)
}
ENTRY %main (x: bf16[4,8], y: f32[4,8]) -> (bf16[4,8], pred[4]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[4,8]{1,0} parameter(1)
  %conv.1 = (bf16[4,8]{1,0}, u8[0]{0}) custom-call(%x, %y), custom_call_target="__cudnn$convForward"
  %part = bf16[4,8]{1,0} get-tuple-element(%conv.1), index=0
  %loop_add_fusion.3 = f32[4,8]{1,0} fusion(%part), kind=kLoop, calls=%fused_add
  ROOT %loop_add_fusion.4 = (bf16[4,8]{1,0}, pred[4]{0}) fusion(%loop_add_fusion.3, %y), kind=kLoop
}
"""


def test_bytes_of_a_program_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    program = importlib.import_module("gpu_ahead_of_time")
    assert program.by_kind(program.operations(HLO)) == {
        "loop_add_fusion": {"operations": 2, "bytes": (64 + 128) + (64 + 4 + 128 + 128)},
        "__cudnn$convForward": {"operations": 1, "bytes": 64 + 64 + 128},
    }


def test_old_rows_of_a_results_file_have_overrides(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    program = importlib.import_module("gpu_ahead_of_time")
    new = {"batch": 1, "overrides": ["forward=dot"]}
    assert program._with_overrides({"batch": 1, "ways": ["forward=dot"]}) == new
    assert program._with_overrides(new) == new


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("train_step")


def test_a_ratio_is_said_only_where_it_is_clear(train_step):
    assert train_step.ratio([1.5, 1.45, 1.6]) == "1.50"
    assert train_step.ratio([0.7, 0.75, 0.72]) == "0.72"
    assert train_step.ratio([0.9, 1.3, 1.05]) == "-"
    assert train_step.ratio([]) == "-"


def test_what_became_slower_is_told(train_step):
    def row(*ratios):
        about = {"network": "n", "batch": 1, "what": "train", "dtype": "float32", "device": "d"}
        sides = {"ours": {"ours_by_this": [1, 1]}, "torch": {"ours_by_this": list(ratios)}}
        return {**about, "processor": "p", "versions": {"jax": "0.12.1"}, "sides": sides}

    said, slower = train_step.difference(row(0.5, 0.6), [row(0.8, 0.9)])
    assert slower
    assert said == "ours/torch: 0.55 now (0.50 to 0.60), 0.85 committed (0.80 to 0.90): slower"
    assert not train_step.difference(row(0.5, 0.85), [row(0.8, 0.9)])[1]
    elsewhere = {**row(0.8, 0.9), "processor": "another"}
    assert train_step.difference(row(0.1, 0.2), [elsewhere]) == (
        "nothing committed of this comparison on such a machine",
        False,
    )


def test_the_most_that_a_gpu_could_do(train_step):
    found = train_step.floor("resnet50", "train", "1 x NVIDIA H200", "bfloat16")
    # 3 x 2 x 4.089 billion multiply-adds at 989 TFLOP/s.
    assert found["flops_images_per_second"] == pytest.approx(989e12 / (6 * 4.089e9), rel=1e-3)
    assert 10_000 < found["bytes_images_per_second"] < 20_000
    assert train_step.floor("resnet50", "train", "1 x cpu", "bfloat16") == {}


def test_the_sides_of_every_plan_name_implementations_that_there_are(train_step):
    from resnet_flax.ops import dispatch

    overrides = importlib.import_module("sides").overrides
    plans = importlib.import_module("speed_session").PLANS
    sides = [side for plan in plans.values() for row in plan for side in row[-1].split(",")]
    ours = [side for side in sides if side.startswith("ours:")]
    assert sum(bool(overrides(side)) for side in ours) > 5
    for side in ours:
        with dispatch.override(**overrides(side)):
            pass


@pytest.mark.long
def test_a_side_that_fails_is_left_out(train_step):
    sides = ["ours", "ours:forward=fft"]
    found = train_step.compare("cifar_resnet8", 8, "infer", "float32", sides, 2, 0.1)
    assert len(found["sides"]["ours"]["images_per_second"]) == 2
    assert set(found["sides"]["ours:forward=fft"]) == {"error"}
    assert "failed: ended" in train_step.table(found)


@pytest.mark.long
def test_speeds_are_compared_and_merged(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/speed_session.py", "--plan=shortest", f"--out={out}"]
    command += ["--rounds=2", "--seconds=0.2"]

    def sit(*flags):
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, printed = sit("--minutes=0.001")
    assert status == 75, printed  # one comparison is always made
    (first,) = json.loads(out.read_text())
    assert set(first["sides"]) == {"ours", "flax_example"}
    assert all(len(side.get("images_per_second", ())) == 2 for side in first["sides"].values()), (
        printed
    )
    status, printed = sit()
    assert status == 0, printed
    rows = json.loads(out.read_text())
    assert rows[0] == first  # not repeated
    assert [row["what"] for row in rows] == ["train", "infer", "resident"]
    status, printed = sit(f"--against={out}", "--minutes=0.001")
    assert "ours/flax_example:" in printed, printed
    assert json.loads(out.read_text()) == rows
    assert max(map(len, printed.splitlines())) <= 120, printed


@pytest.mark.long
@pytest.mark.parametrize("what", ["train", "resident"])
def test_a_step_is_profiled(tmp_path, what):
    out, hlo = tmp_path / "found.json", tmp_path / "step.txt"
    command = [sys.executable, "benchmarks/profile_step.py", "--network=cifar_resnet8"]
    command += ["--batch=8", "--steps=1", f"--what={what}", f"--out={out}", f"--hlo={hlo}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["kinds"]["convolution or product"]["kernels"] >= 10
    assert found["kernels"][0]["microseconds"] >= found["kernels"][-1]["microseconds"] > 0
    assert hlo.read_text().startswith("HloModule")
    assert max(map(len, done.stdout.splitlines())) <= 80, done.stdout


@pytest.mark.long
def test_growth_is_measured_and_drawn(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/growth.py", "--axes=devices", "--steps=1"]
    command += [f"--figure={tmp_path}/found.png"]
    done = subprocess.run(
        [*command, f"--out={out}", "--batch_divisor=8"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [row["at"] for row in json.loads(out.read_text())] == [1, 2, 4, 8]


@pytest.fixture
def same_programs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("same_programs")


def test_programs_are_the_same_whatever_the_order_and_the_names(same_programs):
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2, 3))

    @jax.jit
    def inner(x):
        return jnp.sin(x) + 1

    def named(x, y):
        twice = inner(x) * inner(y)
        return twice, jnp.cos(y)

    def renamed(a, b):
        other = jnp.cos(b)
        return inner(a) * inner(b), other

    def unlike(x, y):
        return inner(x) * inner(y), jnp.cos(y) * 2

    def operations(function):
        return same_programs.count(jax.jit(function).lower(x, x).as_text())

    assert operations(named) == operations(renamed) != operations(unlike)
    sines = {k: n for k, n in operations(named).items() if "sine" in k and "cosine" not in k}
    assert list(sines.values()) == [2]  # a function counts at each call


def test_the_kernels_own_code_is_no_part_of_the_comparison(same_programs):
    line = '%1:2 = stablehlo.custom_call @__gpu$xla.gpu.triton(%a) {x = "}"} : (tensor<2xf32>)'
    assert same_programs.nameless(line) == same_programs.nameless(line.replace('"}"', '"code"'))
