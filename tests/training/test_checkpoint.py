import gc
import json
import random
import re
import shutil
import subprocess
import threading
import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax import create_model, sharding
from resnet_flax.errors import UserError
from resnet_flax.training import quiet
from resnet_flax.training.checkpoint import Checkpoints, SaveError
from resnet_flax.training.checkpoint_files import SUMS, DamagedError, read_meta, read_state
from resnet_flax.training.digests import digests
from resnet_flax.training.state import init_state

ABOUT = {"config": {"steps": 3}, "class_names": ["a", "b"], "preprocessing": {}}


@pytest.fixture(scope="module")
def state():
    model = create_model("cifar_resnet8", stage_features=(8, 16, 32), stem_features=8)
    init = partial(init_state, model=model, tx=optax.sgd(0.1, momentum=0.9), image_shape=(8, 8, 1))
    return jax.jit(init)(0)


@pytest.fixture
def target(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def saved(tmp_path, state):
    """A directory with checkpoints of steps 2 and 3, whose parameters differ."""
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 3):
            scaled = state.replace(params=jax.tree.map(lambda x, s=step: x * s, state.params))
            checkpoints.save(step, scaled, ABOUT)
    return tmp_path / "checkpoints"


def _restore(directory, target, accept=lambda meta: None):
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore_newest(target, accept)


def test_a_save_compiles_nothing_for_each_array(tmp_path, state, caplog):
    state = jax.device_put(state, sharding.replicated(sharding.make_mesh()))
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        digests(state)
        assert "Compiling" in caplog.text
        caplog.clear()
        with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(1, state, ABOUT)
    assert [r.message for r in caplog.records if "Compiling" in r.message] == []


def _flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def test_the_newest_are_kept_and_come_back_bit_for_bit(saved, state, target):
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    restored, meta, notes = _restore(saved, target)
    assert notes == []
    assert {name: meta[name] for name in ABOUT} == ABOUT
    assert (meta["step"], meta["format"]) == (3, 1)
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b * 3)


def test_nothing_saved_nothing_restored(tmp_path, target):
    assert _restore(tmp_path / "checkpoints", target) is None
    assert not (tmp_path / "checkpoints").exists()


# Orbax's own metadata, written with the digests of files; never read.
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_orbax_s_notes_may_be_lost(saved, state, target, content):
    for file in [step / name for step in saved.iterdir() for name in NOTES]:
        file.unlink() if content is None else file.write_bytes(content)
    assert _restore(saved, target)[1]["step"] == 3
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(4, state, ABOUT)
    assert Checkpoints(saved, keep=2).steps() == [4, 3]
    assert _restore(saved, target)[2] == []


def test_any_flipped_byte_is_found_and_named(saved, target):
    files = [f for f in (saved / "3").rglob("*") if f.is_file() and f.name not in NOTES]
    sizes = [file.stat().st_size for file in files]
    rng = random.Random(0)
    for n in range(120):
        # The first hundred in proportion to file sizes, then all files equally.
        file = rng.choices(files, sizes)[0] if n < 100 else rng.choice(files)
        whole = file.read_bytes()
        _flip(file, rng)
        with pytest.raises(DamagedError) as error:
            read_state(saved / "3", target, read_meta(saved / "3"))
        relative = str(file.relative_to(saved / "3"))
        assert relative in str(error.value) or relative in ("meta/metadata", SUMS)
        file.write_bytes(whole)
    read_state(saved / "3", target, read_meta(saved / "3"))


def test_the_previous_checkpoint_is_used_and_the_damaged_one_set_aside(saved, state, target):
    file = max((saved / "3").rglob("*"), key=lambda f: f.stat().st_size * f.is_file())
    _flip(file, random.Random(0))
    restored, meta, notes = _restore(saved, target)
    assert meta["step"] == 2
    assert len(notes) == 1
    assert f"{saved / '3'} is damaged: {file.relative_to(saved / '3')}" in notes[0]
    np.testing.assert_array_equal(
        restored.params["head"]["kernel"], state.params["head"]["kernel"] * 2
    )
    assert [path.name for path in (saved.parent / "damaged").iterdir()] == ["3"]
    with Checkpoints(saved, keep=2) as checkpoints:
        checkpoints.save(3, restored, ABOUT)
    assert _restore(saved, target)[1]["step"] == 3


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_checkpoint_that_another_process_cannot_read_is_not_used(
    saved, target, monkeypatch, fails
):
    """In its metadata, its files or its arrays: all processes use the one before."""
    called = []

    def all_max(number):
        called.append(number)
        return int(len(called) == fails)

    several = SimpleNamespace(all_max=all_max)
    monkeypatch.setattr("resnet_flax.training.checkpoint_files.distributed", several)
    _, meta, notes = _restore(saved, target)
    assert meta["step"] == 2
    assert "3 is damaged: another process cannot read it" in notes[0]
    assert called == [0] * (fails + 3)


def test_all_processes_read_the_checkpoint_that_the_first_one_has(saved, target, monkeypatch):
    numbers = iter((2, 2, 1, 2))  # how many there are for it, and which; then of another process

    def of_the_first(number):
        return next(numbers)

    monkeypatch.setattr("resnet_flax.runtime.distributed.of_the_first", of_the_first)
    assert _restore(saved, target)[1]["step"] == 2
    shutil.rmtree(saved / "3")
    assert _restore(saved, target)[1]["step"] == 2


def test_without_the_files_digests_the_leaf_is_named(saved, target):
    # As after a crash right after the save, or a fault before the bytes reached the disk.
    (saved / "3" / SUMS).unlink()
    stores = [f for f in (saved / "3").rglob("d/*") if f.stat().st_size > 10_000]
    named, rng, meta = set(), random.Random(1), read_meta(saved / "3")
    for _ in range(20):
        file = rng.choice(stores)
        whole = file.read_bytes()
        _flip(file, rng)
        try:
            restored = read_state(saved / "3", target, read_meta(saved / "3"))
        except DamagedError as error:
            # The stores' decompression detects some flips.
            found = re.search("^(.*) does not match|Error reading .([^/]*)/", str(error))
            named.add((found[1] or found[2]).replace(".", "/"))
        else:  # the stores' files have bytes that no leaf needs
            assert digests(restored) == meta["digests"]
        file.write_bytes(whole)
    assert len(named) > 1  # which leaves differ is random, like the names of files
    assert all(name.startswith(("params/", "batch_stats/", "opt_state/")) for name in named)
    read_state(saved / "3", target, read_meta(saved / "3"))


def test_all_damaged_is_an_error_that_moves_nothing(saved, target):
    for step in ("2", "3"):
        _flip(saved / step / "meta" / "metadata", random.Random(0))
    with pytest.raises(UserError, match=r"2 is damaged.*no undamaged one is left"):
        _restore(saved, target)
    assert {path.name for path in saved.iterdir()} == {"2", "3"}


def test_what_is_refused_is_left_alone(saved, target):
    def refuse(meta):
        raise UserError("another experiment")

    with pytest.raises(UserError, match="another experiment"):
        _restore(saved, target, refuse)
    assert {path.name for path in saved.iterdir()} == {"2", "3"}


def test_a_format_from_the_future_is_refused(saved, target, monkeypatch):
    monkeypatch.setattr("resnet_flax.training.checkpoint_files.FORMAT", 0)
    with pytest.raises(
        UserError, match="has format 1, but this version of resnet_flax reads up to"
    ):
        _restore(saved, target)


def test_digests_do_not_depend_on_the_sharding_and_see_every_change():
    x = np.random.default_rng(0).normal(size=(16, 3, 8)).astype(np.float32)
    plain = digests({"x": x})
    for shape, spec in (((8, 1), ("data",)), ((2, 4), (None, None, "fsdp"))):
        mesh = sharding.make_mesh(*shape)
        cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert digests({"x": jax.device_put(x, cut)}) == plain
    changed = x.copy()
    changed.view(np.uint32)[3, 1, 2] ^= 1
    swapped = x[::-1].copy()
    assert len({digests({"x": y})["x"] for y in (x, changed, swapped)}) == 3


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "bfloat16", "float16"])
def test_digests_of_every_type(dtype):
    x = jnp.arange(6).astype(dtype)
    assert digests({"x": x}) == digests({"x": x})
    assert digests({"x": x}) != digests({"x": x.at[4].set(jnp.zeros((), dtype))})


def _save_and_wait(checkpoints, step, state):
    checkpoints.save(step, state, ABOUT)
    checkpoints.wait()


@pytest.mark.parametrize("seen", [True, False])
def test_a_full_disk_is_one_sentence_and_loses_nothing(state, target, disk, monkeypatch, seen):
    usage = shutil.disk_usage
    if not seen:  # as with a quota, which reports space that cannot be used
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=2**40))
    directory = disk / "checkpoints"
    with Checkpoints(directory, keep=5) as checkpoints:
        checkpoints.save(1, state, ABOUT)
        checkpoints.wait()
        (disk / "filler").write_bytes(b"x" * (usage(disk).free - 40_000))
        with pytest.raises(UserError, match=r"step 2 in .*No space left on device.*of step 1"):
            _save_and_wait(checkpoints, 2, state)
        assert [path.name for path in directory.iterdir()] == ["1"]
        (disk / "filler").unlink()
    assert _restore(directory, target)[1]["step"] == 1
    with Checkpoints(directory, keep=5) as checkpoints:
        checkpoints.save(2, state, ABOUT)
    assert _restore(directory, target)[1]["step"] == 2
    gc.collect()  # so that warnings of the failed save appear here, not in a later test


def test_a_disk_without_room_for_directories_ends_a_save_at_once(state, disk):
    """In each part of a save; some of Orbax's threads would wait for a directory for minutes."""
    running = threading.enumerate()
    for inodes in range(3, 14):
        options = f"remount,size=4m,nr_inodes={inodes}"
        subprocess.run(["mount", "-o", options, disk], check=True)
        directory = disk / "checkpoints"
        with Checkpoints(directory, keep=1) as checkpoints:
            with pytest.raises(UserError, match="No space left on device"):
                _save_and_wait(checkpoints, 1, state)
            assert list(directory.iterdir()) == []
        for thread in threading.enumerate():
            of_a_pool = re.search(r"_\d+$", thread.name)  # idle, and ends with the program
            if thread not in running and not of_a_pool:
                threading.Thread.join(thread, 10)  # Orbax's own raises the error again
                assert not thread.is_alive()
    gc.collect()  # so that warnings of the failed save appear here, not in a later test


def async_serialize_from_host():  # its name in Orbax
    async def write_fragment():
        pass

    return write_fragment()


def test_parts_of_a_failed_save_that_never_began_say_nothing():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        quiet.silence_stores()
        async_serialize_from_host()
        gc.collect()
    assert [str(warning.message) for warning in heard] == []
    async_serialize_from_host()  # pytest's own filters would make it fail
    gc.collect()


def test_meta_is_json_that_people_can_read(saved):
    meta = json.loads((saved / "3" / "meta" / "metadata").read_text())
    assert meta["class_names"] == ["a", "b"]
    assert "params/stage1_block1/conv1/kernel" in meta["digests"]


def test_a_directory_that_is_gone_before_a_save_is_a_failed_save(tmp_path, monkeypatch):
    def gone(path):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(shutil, "disk_usage", gone)
    with pytest.raises(SaveError, match=r"step 2 in .*: No such file or directory; .*none yet"):
        checkpoints.save(2, {"w": jnp.zeros(2)}, {})
