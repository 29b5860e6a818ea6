import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax.apply.tables import default_config
from resnet_flax.training.losses import cross_entropy
from resnet_flax.training.optimizer import make_optimizer, make_schedule


def _optim(**settings):
    optim = default_config().optim
    optim.update(settings)
    return optim


def test_cosine_with_warm_up():
    schedule = make_schedule(_optim(learning_rate=0.2, warmup_steps=10), 110)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.1, 0], atol=1e-7)


@pytest.mark.parametrize("warmup", [0, 3])
def test_piecewise_drops_at_its_boundaries_counted_from_the_start(warmup):
    optim = _optim(schedule="piecewise", boundaries=(5, 8), warmup_steps=warmup, learning_rate=1.0)
    schedule = make_schedule(optim, 10)
    values = [float(schedule(step)) for step in range(3, 10)]
    np.testing.assert_allclose(values, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01], rtol=1e-5)


def test_one_cycle_is_a_triangle():
    optim = _optim(schedule="onecycle", learning_rate=0.4, warmup_steps=30)
    values = [float(make_schedule(optim, 100)(step)) for step in (0, 15, 30, 65, 100)]
    np.testing.assert_allclose(values, [0, 0.2, 0.4, 0.2, 0], atol=1e-6)


def test_a_constant_warm_up_as_the_paper_s_resnet_110():
    optim = _optim(
        schedule="piecewise", boundaries=(8,), warmup_steps=4, warmup_rate=0.01, learning_rate=0.1
    )
    values = [float(make_schedule(optim, 10)(step)) for step in (0, 3, 4, 7, 8)]
    np.testing.assert_allclose(values, [0.01, 0.01, 0.1, 0.1, 0.01], rtol=1e-5)


def test_targets_may_be_probabilities():
    logits, labels = jnp.array([[2.0, 0, -1, 0], [0, 1, 0, 3]]), jnp.array([2, 1])
    one_hot = jnp.eye(4)[labels]
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(logits, labels, smoothing)
        np.testing.assert_allclose(cross_entropy(logits, one_hot, smoothing), expected, rtol=1e-6)
    mixed = 0.3 * one_hot + 0.7 * one_hot[::-1]
    expected = 0.3 * cross_entropy(logits, labels) + 0.7 * cross_entropy(logits, labels[::-1])
    np.testing.assert_allclose(cross_entropy(logits, mixed), expected, rtol=1e-6)


def test_constant():
    assert float(make_schedule(_optim(schedule="constant"), 10)(7)) == pytest.approx(0.1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["kernels", "all"])
def test_sgd_with_coupled_decay_as_the_paper_and_torch(nesterov, decay):
    optim = _optim(weight_decay=0.1, momentum=0.5, nesterov=nesterov, decay=decay)
    tx = make_optimizer(optim, optax.constant_schedule(0.01))
    params = {"conv1": {"kernel": jnp.array([2.0, -1])}, "norm1": {"scale": jnp.array([3.0, 1])}}
    state = tx.init(params)
    expected = {"conv1": np.array([2.0, -1]), "norm1": np.array([3.0, 1])}
    velocity = {"conv1": 0.0, "norm1": 0.0}
    for gradient in (1.0, -2.0, 0.5):
        grads = {"conv1": {"kernel": jnp.full(2, gradient)}, "norm1": {"scale": jnp.full(2, 1.0)}}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in (("conv1", gradient), ("norm1", 1.0)):
            if name == "conv1" or decay == "all":
                g = g + 0.1 * expected[name]
            velocity[name] = 0.5 * velocity[name] + g
            step = g + 0.5 * velocity[name] if nesterov else velocity[name]
            expected[name] = expected[name] - 0.01 * step
    np.testing.assert_allclose(params["conv1"]["kernel"], expected["conv1"], rtol=1e-6)
    np.testing.assert_allclose(params["norm1"]["scale"], expected["norm1"], rtol=1e-6)


def test_cross_entropy_and_smoothing():
    logits, labels = jnp.array([[2.0, 0, -1, 0]]), jnp.array([2])
    log_p = np.asarray(logits[0] - np.log(np.exp(logits[0]).sum()))
    np.testing.assert_allclose(cross_entropy(logits, labels), [-log_p[2]], rtol=1e-6)
    smooth = -(0.9 * log_p[2] + 0.1 * log_p.mean())
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.1), [smooth], rtol=1e-6)
