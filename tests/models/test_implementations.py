"""A complete network computes the same with all implementations of its operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_at_every_element, assert_close_in_norm
from devices import as_chosen_for_a_gpu
from marks import long
from variables import drawn

from resnet_flax.models import create_model
from resnet_flax.ops import dispatch
from resnet_flax.ops.dispatch import ConvImplementation


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "axes", "size"),
    [
        long("resnet50", {"stage_sizes": (2, 1), "stage_features": (8, 16)}, 32),
        long("resnet18", {"stage_sizes": (1, 2), "stage_features": (8, 16), "scan": True}, 33),
        ("seresnet50", {"stage_sizes": (1, 1), "stage_features": (16, 16)}, 32),
        long("seresnet50", {"stage_sizes": (1, 2), "stage_features": (16, 16)}, 32),
        long("cifar_resnetv2_110", {"stage_sizes": (2, 2), "stage_features": (8, 16)}, 16),
    ],
)
def test_a_network_is_the_same(name, axes, size):
    model = create_model(name, num_classes=5, **axes, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, size, size, 3)))
    variables = drawn(model, x)
    # Scales of zero would hide what comes after them.
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1), variables)

    def gradients(**implementations):
        def loss(params):
            with dispatch.override(**implementations):
                logits, updated = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
            return (logits**2).sum(), (logits, updated)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    plain = {"forward": "conv", "input_gradient": "native", "kernel_gradient": "native"}
    plain["conv_bn_1x1"] = "unfused"
    expected = gradients(**plain, pooling="native", statistics="two_pass")
    assert_close_in_norm(gradients(), expected, 1e-10)
    # Implementations of separate operations are combined, as compiling takes the time.
    for implementations in (
        {
            **dict.fromkeys(ConvImplementation._fields, "tap_matmul"),
            "pooling": "separable",
            "statistics": "one_pass",
        },
        {
            **dict.fromkeys(ConvImplementation._fields, "winograd"),  # 3x3 convolutions
            "conv_bn_1x1": "fused",
            "pooling": "indexed",
            "statistics": "one_pass",
            "fusion": "guided",
        },
        {"input_gradient": "polyphase", "kernel_gradient": "canonical"},
        dict.fromkeys(ConvImplementation._fields, "width_to_channels"),
        dict.fromkeys(ConvImplementation._fields, "dot"),
    ):
        assert_close_in_norm(gradients(**{**plain, **implementations}), expected, 1e-10)


def test_what_a_gpu_runs_is_the_same():
    model = create_model("resnet18", num_classes=5, stage_sizes=(1, 1), stage_features=(8, 16))
    cifar = create_model(
        "cifar_resnet20", num_classes=5, stage_sizes=(1, 1), stage_features=(16, 16)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    for network in (model, cifar):
        variables = jax.tree.map(lambda leaf: leaf + 0.1, drawn(network, x))

        def gradient(params, network=network, variables=variables):
            given = {**variables, "params": params}
            logits, _ = network.apply(given, x, train=True, mutable=["batch_stats"])
            return (logits**2).sum()

        expected = jax.jit(jax.grad(gradient))(variables["params"])
        with as_chosen_for_a_gpu():
            actual = jax.jit(lambda params: jax.grad(gradient)(params))(variables["params"])
        assert_close_in_norm(actual, expected, 1e-3)


@pytest.mark.usefixtures("x64")
def test_a_network_is_the_same_by_kernels_for_gpus():
    axes = {"stage_sizes": (1, 1), "stage_features": (16, 32)}
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = create_model("cifar_resnet20", num_classes=5, **axes, **types)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1), drawn(model, x))

    def gradients(conv_bn_3x3):
        def loss(params):
            with dispatch.override(conv_bn_3x3=conv_bn_3x3):
                logits, updated = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
            return (logits**2).sum(), (logits, updated)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    assert_close_at_every_element(gradients("triton"), gradients("unfused"), 1e-10)
