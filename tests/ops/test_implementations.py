"""The ways to compute convolutions, poolings and normalisations: the same values and gradients."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import long
from variables import drawn

from resnet_flax import ops
from resnet_flax.errors import UserError
from resnet_flax.models import create_model
from resnet_flax.models.layers import BatchNorm
from resnet_flax.ops import (
    BatchNormSpec,
    ConvSpec,
    batch_norm,
    conv2d,
    dispatch,
    heuristics,
    max_pool,
    winograd,
)
from resnet_flax.ops.dispatch import ByDevice
from resnet_flax.ops.fused_1x1 import conv_batch_norm_1x1
from resnet_flax.ops.spec import NormalizedConv

ONE, HALF = ((1, 1), (1, 1)), ((0, 0), (0, 0))
# Height, width, channels, features, kernel and geometry.
CONVOLUTIONS = [
    (8, 7, 3, 4, (1, 1), ConvSpec()),
    (9, 8, 4, 6, (1, 1), ConvSpec((2, 3))),
    (8, 7, 3, 4, (3, 3), ConvSpec((1, 1), ONE)),
    (9, 6, 3, 4, (3, 3), ConvSpec((1, 1), ((0, 2), (3, 0)))),
    (8, 8, 3, 4, (3, 3), ConvSpec((2, 2), ONE)),
    (9, 7, 3, 4, (3, 3), ConvSpec((2, 2), ONE)),
    (14, 15, 3, 4, (7, 7), ConvSpec((2, 2), ((3, 3), (3, 3)))),
    (9, 9, 2, 3, (3, 3), ConvSpec((4, 4), ONE)),
    (11, 12, 2, 4, (2, 5), ConvSpec((3, 2), ((0, 2), (3, 0)))),
    (9, 8, 3, 2, (3, 3), ConvSpec((2, 1), ((2, 2), (2, 2)), (2, 2))),
    (9, 8, 4, 4, (3, 3), ConvSpec((2, 2), ONE, (1, 1), 2)),
    # Several columns for one: four, and two of which a kernel sees two on either side.
    (8, 12, 3, 4, (5, 7), ConvSpec((1, 1), ((0, 2), (3, 3)))),
    (7, 6, 3, 32, (3, 7), ConvSpec((1, 1), ((1, 1), (3, 3)))),
]
PARTS = {name: dispatch.IMPLEMENTATIONS[name] for name in dispatch.ConvImplementation._fields}


def _close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def _both(function, *operands):
    y, vjp = jax.vjp(function, *operands)
    rng = np.random.default_rng(7)
    return y, vjp(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), y)
    )


def _gradients(function, *operands):
    return jax.jit(partial(_both, function))(*operands)


@functools.cache
def _plain():
    """Operands, geometry, and what XLA's own convolution and JAX's gradients make of them."""
    rng, cases = np.random.default_rng(0), []
    for h, w, c, o, kernel, geometry in CONVOLUTIONS:
        shapes = (2, h, w, c), (*kernel, c // geometry.groups, o)
        cases.append(([rng.normal(size=shape) for shape in shapes], geometry))

    def convolve(geometry, x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            geometry.strides,
            geometry.padding,
            rhs_dilation=geometry.dilation,
            feature_group_count=geometry.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    found = jax.jit(
        lambda *pairs: [
            _both(partial(convolve, geometry), *pair)
            for pair, (_, geometry) in zip(pairs, cases, strict=True)
        ]
    )(*(operands for operands, _ in cases))
    return [(*case, jax.device_get(each)) for case, each in zip(cases, found, strict=True)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("part", "way"), [(part, way) for part, ways in PARTS.items() for way in ways]
)
def test_every_way_to_convolve(part, way):
    geometries, doubles, expected = [], [], []
    for operands, geometry, gradients in _plain():
        with dispatch.override(**{part: way}):
            shapes = [leaf.shape for leaf in operands]
            if getattr(heuristics.convolution(*shapes, geometry).cpu, part) != way:
                continue
        geometries.append(geometry)
        doubles.append(operands)
        expected.append(gradients)
    assert len(geometries) >= 2

    @jax.jit
    def ours(*pairs):
        with dispatch.override(**{part: way}):
            return [
                _both(lambda x, k, geometry=geometry: conv2d(x, k, *geometry), *pair)
                for geometry, pair in zip(geometries, pairs, strict=True)
            ]

    singles = [[leaf.astype(np.float32) for leaf in pair] for pair in doubles]
    for pairs, tolerance in ((doubles, 1e-13), (singles, 1e-4)):
        for found, wanted in zip(ours(*pairs), expected, strict=True):
            _close(found, wanted, tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (3, 4), (12, 5)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("way", dispatch.IMPLEMENTATIONS["pooling"])
def test_max_pooling_with_and_without_ties(size, ceil, way):
    padding = [(0, (n - 3) % 2) for n in size] if ceil else ONE
    rng = np.random.default_rng(0)
    ties = rng.integers(0, 3, (2, *size, 5))
    assert (ties == 2).mean() > 0.25
    for x in (rng.normal(size=ties.shape), ties, np.zeros(ties.shape), -1.0 - ties):
        x = jnp.asarray(x, jnp.float64)
        with dispatch.override(pooling=way):
            actual = _gradients(lambda x: max_pool(x, ceil), x)
        _close(actual, _gradients(lambda x: nn.max_pool(x, (3, 3), (2, 2), padding), x), 1e-14)


@pytest.mark.parametrize("way", dispatch.IMPLEMENTATIONS["pooling"])
def test_what_is_no_number_passes_the_pooling(way):
    x = jnp.zeros((1, 8, 8, 1)).at[0, 4, 4, 0].set(jnp.nan)
    with dispatch.override(pooling=way):
        y, vjp = jax.vjp(max_pool, x)
        assert jnp.isnan(y).sum() == jnp.isnan(max_pool(x)).sum() == 1
        assert jnp.isfinite(vjp(jnp.ones_like(y))[0]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", dispatch.IMPLEMENTATIONS["pooling"])
def test_second_derivatives_of_the_pooling_go_to_the_first_of_ties(way):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(1, 3, (1, 8, 8, 2)), jnp.float64)
    v = jnp.asarray(rng.normal(size=x.shape))

    def product(pool):
        """Of the Hessian of the sum of cubes with a vector."""
        slope = jax.grad(lambda x: (pool(x) ** 3).sum())
        return jax.jit(jax.grad(lambda x: (slope(x) * v).sum()))(x)

    with dispatch.override(pooling=way):
        actual = product(max_pool)
    _close(actual, product(lambda x: nn.max_pool(x, (3, 3), (2, 2), ONE)), 1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "ways",
    [
        {"statistics": "two_pass", "fusion": "free"},
        {"statistics": "two_pass", "fusion": "guided"},
        {"statistics": "one_pass", "fusion": "free"},
        {"statistics": "one_pass", "fusion": "guided"},
    ],
)
@pytest.mark.parametrize(
    ("groups", "relu", "with_residual"),
    [(1, True, True), (2, True, False), (2, False, True), (4, False, False)],
)
def test_normalisation_with_what_follows_it(ways, groups, relu, with_residual):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, size=(8, 5, 4, 6)))
    residual = jnp.asarray(rng.normal(size=x.shape)) if with_residual else None
    params = {"scale": jnp.asarray(rng.normal(size=6)), "bias": jnp.asarray(rng.normal(size=6))}
    stats = {"mean": jnp.asarray(rng.normal(2, 1, size=6)), "var": jnp.ones(6)}
    norm = BatchNorm(groups, dtype=jnp.float64, param_dtype=jnp.float64)

    def ours(params, x, residual):
        variables = {"params": params, "batch_stats": stats}
        with dispatch.override(**ways):
            return norm.apply(
                variables, x, True, activate=relu, residual=residual, mutable=["batch_stats"]
            )

    def plain(params, x, residual):
        parts = jnp.split(x, groups)
        means = jnp.stack([part.mean((0, 1, 2)) for part in parts])
        variances = jnp.stack([part.var((0, 1, 2)) for part in parts])
        y = jnp.concatenate(
            [(p - m) / jnp.sqrt(v + 1e-5) for p, m, v in zip(parts, means, variances, strict=True)]
        )
        y = y * params["scale"] + params["bias"]
        y = y if residual is None else y + residual
        new = {
            "mean": 0.9 * stats["mean"] + 0.1 * means.mean(0),
            "var": 0.9 * stats["var"] + 0.1 * variances.mean(0),
        }
        return nn.relu(y) if relu else y, jax.lax.stop_gradient({"batch_stats": new})

    _close(_gradients(ours, params, x, residual), _gradients(plain, params, x, residual), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fusion", ["free", "guided"])
@pytest.mark.parametrize(
    ("strides", "relu", "with_residual"),
    [((1, 1), True, True), ((2, 2), True, False), ((2, 3), False, False), ((1, 1), False, True)],
)
def test_normalisation_behind_1x1(fusion, strides, relu, with_residual):
    x, kernel, residual, scale, bias = _widening(strides)
    residual = residual if with_residual else None

    def run(conv_bn_1x1, x, kernel, scale, bias, residual):
        way = dispatch.BatchNormImplementation("two_pass", fusion, conv_bn_1x1)
        others = way._replace(conv_bn_1x1="fused" if conv_bn_1x1 == "unfused" else "unfused")
        ways = ByDevice(way, others, others)  # so that no device's way is that of all
        spec = BatchNormSpec(1, 1e-5, relu, x.dtype, jnp.promote_types(x.dtype, jnp.float32), ways)
        # With the statistics, which have gradients of their own.
        shift = jnp.zeros_like(scale)
        return conv_batch_norm_1x1(spec, strides, x, kernel, scale, bias, residual, shift)

    operands = x, kernel, scale, bias, residual
    expected = _gradients(partial(run, "unfused"), *operands)
    _close(_gradients(partial(run, "fused"), *operands), expected, 1e-13)
    singles = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), operands)
    _close(_gradients(partial(run, "fused"), *singles), expected, 1e-4)

    def plain(x, kernel, scale, bias, residual):
        z = jnp.einsum("bhwc,co->bhwo", x[:, :: strides[0], :: strides[1]], kernel[0, 0])
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        y = (z - mean) / jnp.sqrt(var + 1e-5) * scale + bias
        y = y if residual is None else y + residual
        return nn.relu(y) if relu else y, mean[None], var[None]

    _close(expected, _gradients(plain, *operands), 1e-12)


def _widening(strides):
    rng = np.random.default_rng(0)
    shapes = (4, 6, 6, 5), (1, 1, 5, 20), (4, 6 // strides[0], 6 // strides[1], 20), 20, 20
    x, *rest = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    return jnp.maximum(x + 0.5, 0), *rest


def _conv_norm(relu, strides, x, kernel, scale, bias, residual=None):
    """As `models.layers.conv_norm` has it: activations, means and variances."""
    geometry = ConvSpec(strides)
    found = ops.fused(x.shape, kernel.shape, geometry, dtype=x.dtype, param_dtype=kernel.dtype)
    types = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
    spec = BatchNormSpec(1, 1e-5, relu, *types, found or heuristics.normalisation())
    rest = scale, bias, residual, 0 * bias
    if found is None:
        return batch_norm(spec, conv2d(x, kernel, strides), *rest)
    return conv_batch_norm_1x1(spec, strides, x, kernel, *rest)


@pytest.mark.usefixtures("x64")
def test_gradients_behind_1x1_add_up_in_bfloat16():
    """Errors of matrices that are rounded once for all positions would not average out."""
    rng = np.random.default_rng(0)
    x = jnp.maximum(jnp.asarray(rng.normal(0.5, 1, size=(4, 40, 40, 32))), 0).astype(jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(0, 0.1, size=(1, 1, 32, 128)), jnp.bfloat16)
    dy = jnp.asarray(rng.normal(0.3, 1, size=(4, 40, 40, 128)), jnp.bfloat16)

    def total(way, dtype):
        one = jnp.ones(128, jnp.promote_types(dtype, jnp.float32))

        def run(x):
            with dispatch.override(conv_bn_1x1=way):
                return _conv_norm(False, (1, 1), x, kernel.astype(dtype), one, 0 * one)[0]

        dx = jax.jit(lambda x, dy: jax.vjp(run, x)[1](dy)[0])(x.astype(dtype), dy.astype(dtype))
        return np.asarray(dx, np.float64).sum((0, 1, 2))

    exact = total("unfused", jnp.float64)
    apart, joined = (np.abs(total(w, jnp.bfloat16) - exact).max() for w in ("unfused", "fused"))
    assert joined < 3 * apart  # it was 17 times that with a constant of unrounded matrices


@pytest.mark.usefixtures("x64")
def test_second_derivatives_behind_1x1():
    operands = _widening((2, 2))

    def product(way):
        """Of the Hessian of a function of all operands with a vector."""

        def function(*operands):
            with dispatch.override(conv_bn_1x1=way):
                x, kernel, residual, scale, bias = operands
                y, mean, var = _conv_norm(True, (2, 2), x, kernel, scale, bias, residual)
            return (y**3).sum() + (mean * var).sum()

        every = tuple(range(len(operands)))

        def slope(*operands):
            found = jax.grad(function, argnums=every)(*operands)
            return sum((jnp.sin(leaf) ** 2).sum() for leaf in found)

        return jax.jit(jax.grad(slope, argnums=every))(*operands)

    _close(product("fused"), product("unfused"), 1e-11)


def test_what_a_1x1_convolution_makes_is_not_kept():
    x, kernel, *_ = (leaf.astype(jnp.bfloat16) for leaf in _widening((1, 1)))

    def scratch(way):
        def loss(x, kernels):
            for kernel in kernels:
                with dispatch.override(conv_bn_1x1=way):
                    zero = jnp.zeros(kernel.shape[-1])
                    y, _, _ = _conv_norm(True, (1, 1), x, kernel, zero + 1, zero)
                x = y[..., :5]
            return y.astype(jnp.float32).sum()

        operands = jnp.tile(x, (8, 4, 4, 1)), [kernel] * 16
        program = jax.jit(jax.grad(loss, argnums=1)).lower(*operands).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert scratch("fused") < 0.8 * scratch("unfused")


def test_what_stands_behind_1x1_is_decided_by_device_and_shape():
    def joined(side, channels, features, groups=1, dtype=jnp.bfloat16):
        kernel = (1, 1, channels, features)
        conv = NormalizedConv(side**2, kernel, ConvSpec(), dtype)
        ways = heuristics.normalisation(conv, groups)
        found = [way.conv_bn_1x1 == "fused" for way in (ways.cpu, ways.gpu, ways.tpu)]
        types = {"dtype": dtype, "param_dtype": jnp.float32, "groups": groups}
        for batch in (0, 2):  # of no images there is nothing to fuse
            shape = (batch, side, side, channels)
            one = ops.fused(shape, kernel, ConvSpec(), **types)
            assert (one is not None) == (any(found) and batch > 0)
        return found

    only_gpu, never = [False, True, False], [False] * 3
    assert joined(56, 64, 256) == joined(14, 256, 1024) == only_gpu
    assert joined(56, 256, 64) == joined(7, 512, 2048) == never
    assert joined(56, 64, 256, groups=2) == joined(56, 64, 256, dtype=jnp.float32) == never
    with dispatch.override(conv_bn_1x1="fused"):
        assert joined(1, 64, 64) == [True] * 3
        assert joined(1, 64, 64, groups=2) == never

    def products(platform):
        """Of matrices, in the program of a block's forward pass."""
        small = {"stage_sizes": (1,), "stage_features": (8,), "num_classes": 2}
        model = create_model("resnet50", **small, dtype=jnp.bfloat16)
        x = jnp.ones((4, 64, 64, 3))
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        run = partial(model.apply, train=True, mutable=["batch_stats"])
        program = jax.jit(run).trace(variables, x).lower(lowering_platforms=(platform,))
        return program.as_text().count("stablehlo.dot_general")

    # The head; three kernels of 1x1; of the widening one's input the moments, and these with it.
    assert [products(platform) for platform in ("tpu", "cpu", "cuda")] == [1, 1 + 3, 1 + 3 + 2]


@pytest.mark.usefixtures("x64")
def test_statistics_have_gradients_of_their_own():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(8, 5, 4, 6)))
    spec = BatchNormSpec(2, 1e-5, False, jnp.float64, jnp.float64, heuristics.normalisation())
    one, zero = jnp.ones(6), jnp.zeros(6)

    def plain(x):
        parts = x.reshape(2, 4, 5, 4, 6)
        return parts.mean((1, 2, 3)), parts.var((1, 2, 3))

    actual = _gradients(lambda x: batch_norm(spec, x, one, zero, None, zero)[1:], x)
    _close(actual, _gradients(plain, x), 1e-12)


def test_one_pass_is_exact_about_a_far_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(1000, 1, size=(64, 8, 8, 3)), jnp.float32)
    norm = BatchNorm(momentum=0.0)
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.full(3, 999.5), "var": jnp.ones(3)},
    }
    with dispatch.override(statistics="one_pass"):
        _, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    expected = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["var"], expected, rtol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_keeps_no_map_in_float32(residual):
    x = jnp.ones((8, 6, 6, 16), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def run(x, *added):
        y, _ = norm.apply(variables, x, True, True, *added, mutable=["batch_stats"])
        return y

    _, vjp = jax.vjp(run, x, *[x + 1] * residual)
    maps = [leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size == x.size]
    assert maps == [jnp.bfloat16] * (1 + residual)  # its input, and its output with a residual


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
def test_a_network_is_the_same_whichever_way(name, axes, size):
    model = create_model(name, num_classes=5, **axes, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, size, size, 3)))
    variables = drawn(model, x)
    # Scales of zero would hide what lies behind them.
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1), variables)

    def gradients(**ways):
        def loss(params):
            with dispatch.override(**ways):
                logits, updated = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
            return (logits**2).sum(), (logits, updated)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    plain = {"forward": "conv", "input_gradient": "native", "kernel_gradient": "native"}
    plain["conv_bn_1x1"] = "unfused"
    expected = gradients(**plain, pooling="native", statistics="two_pass")
    _close(gradients(), expected, 1e-10)
    for ways in (
        {"forward": "tap_matmul", "input_gradient": "tap_matmul", "kernel_gradient": "tap_matmul"},
        {"forward": "winograd", "input_gradient": "winograd", "kernel_gradient": "winograd"},
        {"input_gradient": "polyphase", "kernel_gradient": "canonical"},
        {"pooling": "separable", "statistics": "one_pass"},
        {"pooling": "indexed", "statistics": "one_pass", "fusion": "guided"},
        {
            "forward": "width_to_channels",
            "input_gradient": "width_to_channels",
            "kernel_gradient": "width_to_channels",
        },
        {"forward": "dot", "input_gradient": "dot", "kernel_gradient": "dot"},
        {"conv_bn_1x1": "fused"},
    ):
        _close(gradients(**{**plain, **ways}), expected, 1e-10)


def test_the_device_that_a_program_is_lowered_for_decides():
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((1, 1, 16, 16))
    program = jax.jit(jax.grad(lambda x, k: conv2d(x, k).sum() ** 2, argnums=(0, 1)))

    def count(platform):
        text = program.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.dot_general"), text.count("stablehlo.convolution")

    assert count("cpu") == count("cuda") == (3, 0)
    assert count("tpu") == (0, 3)


@pytest.mark.parametrize("activate", [False, True])
def test_guided_is_the_same_bits_in_bfloat16(activate):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 8)), jnp.bfloat16)
    norm = BatchNorm(2, dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def found(fusion, dtype):
        def run(x, residual):
            y, _ = norm.apply(variables, x, True, activate, residual, mutable=["batch_stats"])
            return y

        with dispatch.override(fusion=fusion):
            return _gradients(run, x, (x + 1).astype(dtype))

    for dtype in (jnp.bfloat16, jnp.float32):
        for a, b in zip(
            *(jax.tree.leaves(found(f, dtype)) for f in ("free", "guided")), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_what_a_gpu_runs_is_the_same(monkeypatch):
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
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "call", lambda ways, *operands: ways.gpu(*operands))
            actual = jax.jit(lambda params: jax.grad(gradient)(params))(variables["params"])
        _close(actual, expected, 1e-3)


@pytest.mark.parametrize(("channels", "kernel", "strides"), [(16, 3, (1, 1)), (3, 7, (2, 2))])
def test_a_convolution_of_no_images_in_any_way(channels, kernel, strides):
    operands = jnp.ones((0, 8, 8, channels)), jnp.ones((kernel, kernel, channels, 16))
    y = jax.eval_shape(lambda x, k: conv2d(x, k, strides, ONE), *operands)
    assert y.shape[0] == 0


def test_a_gpu_is_told_what_to_write():
    x, norm = jnp.ones((2, 8, 8, 16), jnp.bfloat16), BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, False)

    def loss(x):
        y, _ = norm.apply(variables, x, True, True, x, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum()

    def barriers(platform):
        program = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=(platform,))
        return program.as_text().count("optimization_barrier")

    # Behind the rounded activations, and before the gradient that the residual shares.
    assert barriers("cuda") == 2
    assert barriers("cpu") == barriers("tpu") == 0


@pytest.mark.parametrize(
    ("size", "channels", "features", "kernel", "strides", "ways"),
    [
        (224, 3, 64, 7, 2, ("space_to_depth", "native", "space_to_depth")),
        (32, 3, 16, 3, 1, ("width_to_channels", "width_to_channels", "width_to_channels")),
        (32, 16, 16, 3, 1, ("width_to_channels", "width_to_channels", "width_to_channels")),
        (16, 32, 32, 3, 1, ("conv", "native", "native")),
        (32, 16, 32, 3, 2, ("conv", "native", "native")),
        (56, 64, 64, 3, 1, ("conv", "native", "native")),
        (56, 64, 256, 1, 1, ("dot", "dot", "dot")),
        (56, 256, 512, 1, 2, ("dot", "dot", "dot")),
    ],
)
def test_the_size_of_a_convolution_decides_on_a_gpu(
    size, channels, features, kernel, strides, ways
):
    geometry = ConvSpec((strides, strides), ((kernel // 2,) * 2,) * 2)
    x, shape = (16, size, size, channels), (kernel, kernel, channels, features)
    assert heuristics.convolution(x, shape, geometry).gpu == ways


@pytest.mark.parametrize(
    ("size", "channels", "features", "strides", "ways"),
    [
        (56, 64, 64, 1, ("winograd", "winograd", "winograd")),
        (16, 64, 64, 1, ("winograd", "winograd", "winograd")),
        (16, 32, 32, 1, ("conv", "canonical", "winograd")),
        (32, 16, 16, 1, ("conv", "canonical", "winograd")),
        (56, 64, 8, 1, ("conv", "canonical", "canonical")),
        (4, 64, 64, 1, ("conv", "canonical", "canonical")),
        (200, 64, 64, 1, ("conv", "canonical", "canonical")),
        (2, 512, 512, 1, ("tap_matmul", "tap_matmul", "tap_matmul")),
        (56, 128, 128, 2, ("conv", "polyphase", "tap_matmul")),
        (32, 16, 32, 2, ("conv", "polyphase", "tap_matmul")),
        (32, 3, 16, 1, ("conv", "canonical", "row_im2col")),
        (14, 512, 512, 2, ("tap_matmul", "tap_matmul", "tap_matmul")),
    ],
)
def test_the_size_of_a_3x3_convolution_decides_on_a_cpu(size, channels, features, strides, ways):
    geometry = ConvSpec((strides, strides), ONE)
    x, kernel = (16, size, size, channels), (3, 3, channels, features)
    assert heuristics.convolution(x, kernel, geometry).cpu == ways


@pytest.mark.parametrize(
    ("size", "channels", "features", "strides", "dtype", "ways"),
    [
        (56, 64, 64, 1, "float32", ("conv", "canonical", "winograd")),
        (28, 128, 128, 1, "float32", ("winograd", "winograd", "winograd")),
        (14, 256, 512, 2, "float32", ("conv", "tap_matmul", "tap_matmul")),
        (2, 512, 512, 1, "float32", ("tap_matmul", "tap_matmul", "tap_matmul")),
        (28, 128, 128, 1, "bfloat16", ("conv", "canonical", "row_im2col")),
        (56, 64, 64, 1, "bfloat16", ("conv", "canonical", "winograd")),
        (2, 512, 512, 1, "bfloat16", ("conv", "canonical", "row_im2col")),
        (14, 256, 512, 2, "bfloat16", ("conv", "polyphase", "row_im2col")),
        (32, 16, 16, 1, "bfloat16", ("conv", "canonical", "winograd")),
        (8, 16, 16, 1, "float32", ("conv", "canonical", "row_im2col")),
    ],
)
def test_a_program_for_onednn_convolves_more(size, channels, features, strides, dtype, ways):
    geometry = ConvSpec((strides, strides), ONE)
    x, kernel = (16, size, size, channels), (3, 3, channels, features)
    with ops.target(onednn=True):
        found = heuristics.convolution(x, kernel, geometry, dtype)
    assert found.cpu == ways
    assert found.gpu == heuristics.convolution(x, kernel, geometry, dtype).gpu
    assert not dispatch.current_target().onednn


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2.5e-3), ("float32", 2e-6)])
def test_minimal_filtering_keeps_the_digits_of_its_type(dtype, tolerance):
    rng = np.random.default_rng(0)
    shapes = (2, 14, 14, 64), (3, 3, 64, 64)
    exact = [jnp.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]

    def run(way, *operands):
        with dispatch.override(**dict.fromkeys(PARTS, way)):
            return _gradients(lambda x, k: conv2d(x, k, padding=ONE), *operands)

    found = run("winograd", *exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    expected = run("tap_matmul", *(leaf.astype(jnp.float64) for leaf in exact))
    _close([leaf.astype(jnp.float64) for leaf in jax.tree.leaves(found)], expected, tolerance)


@pytest.mark.usefixtures("x64")
def test_minimal_filtering_takes_large_maps_in_runs_of_rows(monkeypatch):
    # Shapes of this test alone: what other tests traced would be taken as it is.
    monkeypatch.setattr(winograd, "RUN", 1)
    rng = np.random.default_rng(0)

    def convolved(way, *operands):
        with dispatch.override(**dict.fromkeys(PARTS, way)):
            return _gradients(lambda x, k: conv2d(x, k, padding=((1, 2), (0, 0))), *operands)

    def loops(*operands):
        return str(jax.make_jaxpr(lambda *o: convolved("winograd", *o))(*operands)).count("scan[")

    # One row of tiles at a time; two rows forward, the last tiles with zeros; no row at all.
    for batch, loops_ in ((4, 3), (2, 3), (0, 0)):
        shapes = (batch, 14, 11, 3), (3, 3, 3, 4)
        operands = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        assert loops(*operands) == loops_
        _close(convolved("winograd", *operands), convolved("tap_matmul", *operands), 1e-13)
    many = winograd.FEW_CHANNELS + 1
    assert loops(jnp.zeros((many, 15, 11, 3)), jnp.zeros((3, 3, 3, many))) == 2


@pytest.mark.usefixtures("x64")
def test_minimal_filtering_has_second_derivatives():
    rng = np.random.default_rng(0)
    x, k, v = (jnp.asarray(rng.normal(size=s)) for s in ((2, 5, 6, 3), (3, 3, 3, 4), (3, 3, 3, 4)))

    def product(way):
        def loss(k):
            with dispatch.override(**dict.fromkeys(PARTS, way)):
                return (conv2d(x, k, padding=ONE) ** 3).sum()

        return jax.jit(jax.grad(lambda k: (jax.grad(loss)(k) * v).sum()))(k)

    _close(product("winograd"), product("tap_matmul"), 1e-12)


def test_no_such_way():
    with (
        pytest.raises(
            UserError, match=r"there is no implementation forward=fft; .*forward=conv\|dot"
        ),
        dispatch.override(forward="fft"),
    ):
        pass
