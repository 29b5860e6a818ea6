"""Resident images give the same results as streamed ones."""

import json
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from classifiers import classification
from marks import long

from resnet_flax import create_model, sharding
from resnet_flax.apply.experiment import train
from resnet_flax.apply.tables import default_config
from resnet_flax.data.experiment import augment_and_normalize, make_preprocessing
from resnet_flax.data.pipeline import train_batches
from resnet_flax.data.sampler import Sampler
from resnet_flax.data.sources import ArraySource
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.training.compile import compile_init, compile_resident, compile_steps
from resnet_flax.training.input import Resident, Streaming
from resnet_flax.training.optimizer import make_optimizer
from resnet_flax.training.state import TrainState, init_state
from resnet_flax.training.steps import train_step

BATCH, EXAMPLES = 16, 40


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 8, 8, 3), np.uint8)
    return ArraySource(images, rng.integers(0, 10, EXAMPLES), tuple("0123456789"))


EVERYTHING = {"mixup": 0.2, "cutmix": 1.0, "erase": 0.3, "pca_lighting": 0.1, "std": (0.3,)}


def _prepare(dtype, pixel_mean=True, **settings):
    data = default_config().data
    data.update(pad=2, flip=True, **settings)
    mean_image = np.full((8, 8, 3), 100, np.float32) if pixel_mean else None
    preprocessing = make_preprocessing(data, mean_image)
    return partial(
        augment_and_normalize,
        data=data,
        preprocessing=preprocessing,
        classes=10,
        dtype=dtype,
    ), partial(preprocessing.normalize, dtype=dtype)


CHANNELS = {"pixel_mean": False, "mean": (0.49, 0.48, 0.44), "std": (0.2, 0.19, 0.21)}


@pytest.mark.parametrize(
    ("devices", "dtype", "recipe"),
    [
        (1, "float32", EVERYTHING),
        (8, "float32", EVERYTHING),
        (1, "float32", {}),
        (1, "float32", CHANNELS),
        (1, "float32", CHANNELS | {"mixup": 0.2}),
        long(1, "float32", CHANNELS | {"cutmix": 1.0, "erase": 0.5}),
        (1, "float32", CHANNELS | {"pca_lighting": 0.1}),
        long(8, "float32", {"pca_lighting": 0.1, "mixup": 0.2}),
        (1, "bfloat16", CHANNELS | {"mixup": 0.2}),
    ],
)
def test_batches_are_equal_bit_for_bit(source, devices, dtype, recipe):
    """A network's input: gathered, cropped, flipped, mixed on the devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    prepare, _ = _prepare(jnp.dtype(dtype), **recipe)

    def record(state, batch, seed):  # in place of train_step
        x, targets = prepare(batch["image"], batch["label"], state.step, seed=seed)
        return state.replace(step=state.step + 1), {"x": x, "targets": targets, **batch}

    def at(step):
        return TrainState(jnp.int32(step), {}, {}, {})

    whole = sharding.replicated(mesh)
    steps = compile_resident(mesh, whole, record)
    resident = Resident(steps, source, Sampler(EXAMPLES, 7), BATCH, 4, mesh, 3)
    _, rows = resident.advance(at(5), 5, 3)
    one = jax.jit(record, in_shardings=(whole, sharding.over_batch(mesh), whole))
    with train_batches(source, seed=7, batch_size=BATCH, start=5) as batches:
        for i, batch in enumerate(islice(batches, 3)):
            _, expected = one(at(5 + i), sharding.put_batch(batch, mesh), 3)
            for name, value in expected.items():
                np.testing.assert_array_equal(rows[name][i], value, err_msg=name)
    assert not rows["mask"][3].any()  # a row that was not requested stays empty


def _runs(source, shape, steps):
    """The state after some steps and their sums, streamed and resident."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    widths = {"stage_features": (8, 16, 32), "stem_features": 8}
    model = create_model("cifar_resnet8", **widths, **types)
    tx = make_optimizer(default_config().optim, optax.constant_schedule(0.1))
    prepare, normalize = _prepare(jnp.float64, **EVERYTHING)
    init, shardings = compile_init(
        partial(init_state, model=model, tx=tx, image_shape=(8, 8, 3)), mesh
    )
    task = classification(model, prepare, normalize)
    step = partial(train_step, loss_fn=task.loss_fn, prepare=task.prepare, tx=tx)
    with train_batches(source, seed=7, batch_size=BATCH) as batches:
        compiled, _ = compile_steps(mesh, shardings, step, task.eval_step)
        streaming = Streaming(compiled, batches, mesh, 3)
        state, streamed = init(0), []
        for i in range(steps):
            state, sums = streaming.advance(state, i, 1)
            streamed.append(jax.device_get(sums))
        yield jax.device_get(state), streamed
    resident = Resident(
        compile_resident(mesh, shardings, step, known_length=True),
        *(source, Sampler(EXAMPLES, 7), BATCH, 4, mesh, 3),
    )
    state, kept, done = init(0), [], 0
    while done < steps:
        n = min(4, steps - done)
        state, rows = resident.advance(state, done, n)
        kept += [{name: values[i] for name, values in rows.items()} for i in range(n)]
        done += n
    yield jax.device_get(state), jax.device_get(kept)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_runs_are_equal(source, shape):
    (streamed, sums), (kept, kept_sums) = _runs(source, shape, 6)
    assert int(kept.step) == 6

    def near(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-10 * np.linalg.norm(b)

    jax.tree.map(near, kept, streamed)
    jax.tree.map(near, kept_sums, sums)


def _records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_loop_records_evaluates_and_saves_at_the_same_steps(config, tmp_path):
    config.log.every = 1
    streamed = train(config, tmp_path / "streaming")
    config.data.resident = True
    config.steps_per_dispatch = 3  # which divides neither 4, the interval of evaluation
    kept = train(config, tmp_path / "resident")
    ours, theirs = _records(tmp_path / "resident"), _records(tmp_path / "streaming")
    order = [(record["split"], record["step"]) for record in ours]
    assert sorted(order) == sorted((r["split"], r["step"]) for r in theirs)
    assert [step for split, step in order if split == "test"] == [4, 8, 12]
    by_step = {(r["split"], r["step"]): r for r in theirs}
    for record in ours:
        other = by_step[record["split"], record["step"]]
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert kept.error == pytest.approx(streamed.error, abs=0.02)


def test_a_resident_run_goes_on_with_the_same_bits(config, tmp_path):
    config.data.resident = True
    config.steps_per_dispatch = 5
    config.optim.schedule = "constant"
    train(config, tmp_path / "whole")
    config.steps = 7
    train(config, tmp_path / "parts")
    config.steps = 12
    train(config, tmp_path / "parts")
    whole, parts = (
        read_meta(tmp_path / run / "checkpoints" / "12")["digests"] for run in ("whole", "parts")
    )
    assert whole == parts
