"""Trainings and evaluations under JAX's strict settings, which refuse implicit conversions."""

import contextlib

import jax
import numpy as np
import pytest
from experiments import TINY

import resnet_flax
from resnet_flax.data.sources import ArraySource
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.evaluation.pretrained import evaluate_pretrained
from resnet_flax.training.checkpoint_files import read_meta
from resnet_flax.weights.loading import load

SHARED = {
    "model.name": "cifar_resnet8",
    "model.overrides": TINY,
    "batch_size": 16,
    "accumulation": 2,
    "data.mixup": 0.1,
    "data.erase": 0.2,
    "data.pad": 1,
    "data.flip": True,
    "eval.recompute_bn": 2,
    "eval.every": 1,
    "log.every": 1,
    "log.tensorboard": False,
}
RUNS = {
    "streaming": {
        "data.cutmix": 1.0,
        "data.crop": "random_resized",
        "data.size": 8,
        "data.policy": "randaugment",
        "data.mean": (0.5, 0.4, 0.3),
        "data.std": (0.2, 0.2, 0.3),
        "data.pca_lighting": 0.1,
        "optim.label_smoothing": 0.1,
        "optim.warmup_steps": 1,
        "eval.metrics": "balanced_error",
    },
    "resident": {
        "data.resident": True,
        "steps_per_dispatch": 2,
        "data.pixel_mean": True,
        "model.dtype": "bfloat16",
        "model.bn_group_size": "1",
        "optim.schedule": "onecycle",
    },
}


@contextlib.contextmanager
def _strict():
    """For all threads, as the variables of the environment are; not only for this one."""
    settings = {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_transfer_guard": "disallow",
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _config(settings, steps):
    config = resnet_flax.default_config()
    config.update_from_flattened_dict({**SHARED, **settings, "steps": steps})
    return config


def _split(n):
    rng = np.random.default_rng(n)
    images = rng.integers(0, 256, (n, 12, 12, 3), np.uint8)
    return ArraySource(images, rng.integers(0, 4, n), tuple("abcd"))


@pytest.mark.long
@pytest.mark.parametrize("kind", RUNS)
def test_nothing_is_converted_implicitly_and_no_number_changes(tmp_path, kind):
    splits = {"data": _split(70), "eval_data": _split(37)}
    for name, settings in (("usual", contextlib.nullcontext()), ("strict", _strict())):
        with settings:
            for steps in (2, 4):  # the second continues the first
                workdir = tmp_path / name
                result = resnet_flax.train(_config(RUNS[kind], steps), workdir, **splits)
        digests = read_meta(workdir / "checkpoints" / "4")["digests"]
        if name == "usual":
            expected = result, digests
    assert (result, digests) == expected


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["center", "ten_crop", "multiscale"])
def test_evaluations_convert_nothing_implicitly(tmp_path, protocol):
    source = _split(37)
    config = _config({**RUNS["streaming"], "eval.recompute_bn": 0}, 2)
    resnet_flax.train(config, tmp_path / "run", data=source, eval_data=source)

    def evaluated():
        found = load(tmp_path / "run")
        network = Network(found.model, found.variables, found.preprocessing)
        scales = (8, 12) if protocol == "multiscale" else ()
        more = {"confusion": True, "more": ["balanced_error"], "batch_size": 16}
        return evaluate_pretrained([network], source, protocol=protocol, scales=scales, **more)

    expected = evaluated()
    with _strict():
        assert evaluated() == expected


def test_a_step_is_traced_under_them():
    """The quick part: what is compiled refuses nothing."""
    from resnet_flax import sharding
    from resnet_flax.apply import tables
    from resnet_flax.apply.experiment import make_programs

    config = tables.check(_config({**RUNS["streaming"], "data.size": 8}, 4))
    mesh = sharding.make_mesh()
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((16,), np.int32),
        "mask": jax.ShapeDtypeStruct((16,), bool),
    }
    with _strict():
        _, programs = make_programs(config, mesh, 4, (8, 8, 3))
        seed = jax.ShapeDtypeStruct((), np.int32)
        state = jax.eval_shape(programs.init, seed)
        after, sums = jax.eval_shape(programs.train_step, state, batch, seed)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(
        lambda leaf: leaf.shape, state
    )
    assert set(sums) >= {"loss", "error", "count"}
