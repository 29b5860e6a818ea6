"""The task of a classifier, and a step and a loop that know no task."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from resnet_flax import sharding
from resnet_flax.apply import tables
from resnet_flax.config import load_config
from resnet_flax.data.readers import PATIENT
from resnet_flax.data.sources import ArraySource
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.training import loop
from resnet_flax.training.programs import Task, compile_programs
from resnet_flax.training.run import Run
from resnet_flax.training.state import TrainState
from resnet_flax.training.steps import step_key, train_step
from resnet_flax.training.writers import read_metrics


def _keys_of(seed, step, microbatches):
    """The keys that a loss is called with, by a step of several microbatches."""

    def loss_fn(params, batch_stats, batch, rng, step):
        drawn = jax.random.uniform(rng, (4,))
        return params["w"].sum() * 0 + drawn.sum(), ({"drawn": drawn}, batch_stats)

    state = TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {}, optax.sgd(0.1).init({}))
    batch = {"mask": jnp.ones(4, bool)}
    _, sums = train_step(
        state,
        batch,
        seed,
        loss_fn=loss_fn,
        prepare=lambda batch, step, seed: batch,
        tx=optax.sgd(0.1),
        num_microbatches=microbatches,
    )
    return np.asarray(sums["drawn"])


def test_the_key_of_a_loss_folds_seed_step_and_microbatch():
    one = _keys_of(0, 5, 1)
    np.testing.assert_array_equal(one, _keys_of(0, 5, 1))
    assert not np.any(one == _keys_of(1, 5, 1))
    assert not np.any(one == _keys_of(0, 6, 1))
    keys = [jax.random.fold_in(step_key(0, 5), number) for number in range(2)]
    expected = sum(np.asarray(jax.random.uniform(key, (4,))) for key in keys)
    np.testing.assert_allclose(_keys_of(0, 5, 2), expected, rtol=1e-6)


def test_the_seed_is_an_argument_of_the_program():
    """One compiled step serves several seeds, and `vmap` over seeds is several trainings."""
    compiled = jax.jit(partial(_keys_of_seed, 5))
    np.testing.assert_array_equal(compiled(jnp.int32(3)), _keys_of(3, 5, 1))
    several = jax.vmap(partial(_keys_of_seed, 5))(jnp.arange(3))
    np.testing.assert_allclose(several, [_keys_of(seed, 5, 1) for seed in range(3)], rtol=1e-6)


def _keys_of_seed(step, seed):
    return jax.random.uniform(jax.random.fold_in(step_key(seed, step), 0), (4,))


class Mean(nn.Module):
    """A linear function of the mean of an image, with dropout."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.1, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(1)(x)[:, 0]


@dataclasses.dataclass(frozen=True)
class Regression:
    """Predicts the label as a number: squared error."""

    model: nn.Module

    def prepare(self, batch, step, seed):
        return {**batch, "image": batch["image"] / 255}

    def loss_fn(self, params, batch_stats, batch, rng, step):
        found = self.model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": rng}
        )
        squares = (found - batch["label"]) ** 2 * batch["mask"]
        return squares.sum(), ({"absolute": jnp.sqrt(squares).sum()}, batch_stats)

    def keeping_nothing(self):
        return self

    def eval_step(self, variables, batch, states):
        found = self.model.apply(variables, batch["image"] / 255, train=False)
        squares = (found - batch["label"]) ** 2 * batch["mask"]
        return {"sum": states["sum"] + squares.sum(), "n": states["n"] + batch["mask"].sum()}

    @property
    def measures(self):
        return SimpleNamespace(
            zeros=lambda dtype: {"sum": jnp.zeros((), dtype), "n": jnp.zeros((), jnp.int32)},
            result=lambda states, expected, labelled: MeanSquare(
                float(states["sum"]) / expected, int(states["n"])
            ),
        )


@dataclasses.dataclass(frozen=True)
class MeanSquare:
    loss: float
    count: int

    def record(self):
        return {"loss": self.loss, "count": self.count}

    def final(self):
        return self.record()

    def __str__(self):
        return f"squared error: {self.loss:.4f}"


def test_a_task_of_another_kind_trains_by_the_same_loop(tmp_path, capsys):
    assert isinstance(Regression(Mean()), Task)
    config = load_config("configs/digits_resnet20.py")
    config.steps, config.batch_size, config.optim.warmup_steps = 60, 32, 0
    config.optim.weight_decay, config.log.tensorboard, config.log.every = 0.0, False, 20
    config.optim.schedule, config.optim.learning_rate = "constant", 0.3
    config = tables.check(config)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 256)
    images = np.clip(60 * labels[:, None, None, None] + rng.integers(0, 9, (256, 4, 4, 1)), 0, 255)
    source = ArraySource(images.astype(np.uint8), labels, tuple("abcd"))
    mesh, task = sharding.make_mesh(devices=jax.devices()[:1]), Regression(Mean())
    schedule = optax.constant_schedule(0.3)
    programs = compile_programs(
        task, mesh, (4, 4, 1), schedule=schedule, tx=optax.sgd(schedule, 0.9)
    )
    about = {"class_names": list("abcd"), "data": {}, "preprocessing": {}}
    run = Run(
        *(config, tables.keys(), "a regression", mesh, task, programs, source, source),
        *(TrainTransform(), EvalTransform()),
        about={
            **about,
            "config": dict(config.to_dict()) | {"data.eval_split": "test", "steps": 60},
        },
        files={},
        notes=[],
        shapes={split: {"image": (4, 4, 1)} for split in ("train", "eval")},
        patience=PATIENT,
    )
    result = loop.train(run, tmp_path / "run")
    assert result.loss < 0.1  # the labels' variance is 1.25
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [20, 40, 60]
    assert records[0]["absolute"] > records[-2]["absolute"] > 0
    assert "squared error" in capsys.readouterr().out


@pytest.mark.usefixtures("x64")
def test_microbatches_give_the_gradient_of_the_batch():
    task = Regression(Mean())
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (8, 4, 4, 1))),
        "label": jnp.arange(8.0),
        "mask": jnp.arange(8) != 3,
    }
    params = {"Dense_0": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}
    tx = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), params, {}, tx.init(params))

    def loss_fn(params, batch_stats, batch, rng, step):  # without dropout, which differs
        found = task.model.apply({"params": params}, batch["image"], train=False)
        squares = (found - batch["label"]) ** 2 * batch["mask"]
        return squares.sum(), ({}, batch_stats)

    after = [
        train_step(
            *(state, batch, 0),
            loss_fn=loss_fn,
            prepare=task.prepare,
            tx=tx,
            num_microbatches=number,
        )[0].params
        for number in (1, 2, 4)
    ]
    expected = jax.grad(
        lambda p: loss_fn(p, {}, task.prepare(batch, 0, 0), None, 0)[0] / batch["mask"].sum()
    )(params)
    for found in after:
        jax.tree.map(
            lambda new, old, g: np.testing.assert_allclose(old - new, g, rtol=1e-12),
            *(found, params, expected),
        )
