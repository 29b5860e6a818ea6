"""A run continues on any layout of devices and processes as if it had been there from the start."""

import shutil

import float64_run
import jax
import numpy as np
import pytest
import together

from resnet_flax.training import checkpoint_files

# By name: processes, devices of each, and mesh.fsdp; all other devices share the batch. They are a
# ring: each layout and the next (after the last, the first) differ in one or two of these.
LAYOUTS = {
    "one device": (1, 1, 1),
    "8": (1, 8, 1),
    "4 x 2": (1, 8, 2),
    "2 processes, 4 x 2": (2, 4, 2),
    "2 processes, 1 x 8": (2, 4, 8),
    "1 x 8": (1, 8, 8),
}


def _state(workdir, step):
    """All leaves of a checkpoint, by path."""
    path = workdir / "checkpoints" / str(step)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with jax.enable_x64(True):
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
            checkpoint_files._saved_tree(path),
        )
        state = checkpoint_files.read_state(path, target, checkpoint_files.read_meta(path))
        return {
            jax.tree_util.keystr(name): np.asarray(leaf)
            for name, leaf in jax.tree_util.tree_leaves_with_path(state)
        }


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype  # of counters int32, of all else float64
        distance = np.linalg.norm(found[name] - leaf)
        assert distance <= 1e-10 * np.linalg.norm(leaf), name


@pytest.fixture
def train(data_dir):
    """Trains workdirs to a step on a layout."""
    running = []

    def start(layout, steps, *workdirs):
        processes, devices, fsdp = LAYOUTS[layout]
        if processes == 1:
            for workdir in workdirs:
                float64_run.train(
                    workdir, data_dir, steps, fsdp=fsdp, devices=jax.devices()[:devices]
                )
            return
        flags = (f"--data_dir={data_dir}", f"--steps={steps}", f"--fsdp={fsdp}")
        program = ("-m", "float64_run", *workdirs, *flags)
        started = together.start(running, processes, *program, devices=devices)
        together.ended(started, seconds=1200)

    yield start
    together.kill(running)


@pytest.mark.long
@pytest.mark.timeout(3600)  # three minutes on a machine with nothing else to do
def test_every_layout_continues_what_its_neighbors_began(train, tmp_path):
    train("one device", 12, tmp_path / "whole")
    for before in LAYOUTS:
        train(before, 6, tmp_path / before)
    half, whole = _state(tmp_path / "one device", 6), _state(tmp_path / "whole", 12)
    assert {leaf.dtype for name, leaf in half.items() if "kernel" in name} == {np.dtype("float64")}
    for before in LAYOUTS:
        _assert_same(_state(tmp_path / before, 6), half)
    names = list(LAYOUTS)
    for i, after in enumerate(names):
        copies = [
            shutil.copytree(tmp_path / before, tmp_path / f"{before} to {after}")
            for before in (names[i - 1], names[(i + 1) % len(names)])
        ]
        train(after, 12, *copies)
        for copy in copies:
            _assert_same(_state(copy, 12), whole)
