"""Every implementation of a convolution has XLA's values and JAX's gradients."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import assert_close_in_norm, compiled_value_and_vjp, value_and_vjp

from resnet_flax.ops import ConvSpec, conv2d, dispatch, heuristics

ONE = ((1, 1), (1, 1))
# Height, width, channels, features, kernel and spec.
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
    # Several columns folded into one: four, and two with a kernel that covers two on either side.
    (8, 12, 3, 4, (5, 7), ConvSpec((1, 1), ((0, 2), (3, 3)))),
    (7, 6, 3, 32, (3, 7), ConvSpec((1, 1), ((1, 1), (3, 3)))),
]
GRADIENTS = ("input_gradient", "kernel_gradient")
PARTS = {name: dispatch.IMPLEMENTATIONS[name] for name in dispatch.ConvImplementation._fields}


def _xla_convolution(spec, x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        spec.strides,
        spec.padding,
        rhs_dilation=spec.dilation,
        feature_group_count=spec.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _operands(h, w, c, o, kernel, spec):
    rng = np.random.default_rng(0)
    shapes = (2, h, w, c), (*kernel, c // spec.groups, o)
    return [rng.normal(size=shape) for shape in shapes]


@functools.cache
def _cases():
    """Operands, spec, and the results of XLA's own convolution and JAX's gradients."""
    cases = [(_operands(*case), case[-1]) for case in CONVOLUTIONS]

    @jax.jit
    def all_of_them(*pairs):
        return [
            value_and_vjp(partial(_xla_convolution, spec), *pair)
            for pair, (_, spec) in zip(pairs, cases, strict=True)
        ]

    found = jax.device_get(all_of_them(*(operands for operands, _ in cases)))
    return [(*case, each) for case, each in zip(cases, found, strict=True)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, names in PARTS.items() for name in names]
)
def test_every_implementation(part, name):
    def only(value, gradients):
        """What the implementation computes; programs drop the rest, which has its own tests."""
        return {"forward": value, **dict(zip(GRADIENTS, gradients, strict=True))}[part]

    specs, doubles, expected = [], [], []
    for operands, spec, found in _cases():
        with dispatch.override(**{part: name}):
            shapes = [leaf.shape for leaf in operands]
            if getattr(heuristics.conv_implementation(*shapes, spec).cpu, part) != name:
                continue
        specs.append(spec)
        doubles.append(operands)
        expected.append(only(*found))
    assert len(specs) >= 2

    @jax.jit
    def ours(*pairs):
        with dispatch.override(**{part: name}):
            return [
                only(*value_and_vjp(lambda x, k, spec=spec: conv2d(x, k, *spec), *pair))
                for spec, pair in zip(specs, pairs, strict=True)
            ]

    singles = [[leaf.astype(np.float32) for leaf in pair] for pair in doubles]
    for pairs, tolerance in ((doubles, 1e-13), (singles, 1e-4)):
        for found, wanted in zip(ours(*pairs), expected, strict=True):
            assert_close_in_norm(found, wanted, tolerance)


@pytest.mark.parametrize(("channels", "kernel", "strides"), [(16, 3, (1, 1)), (3, 7, (2, 2))])
def test_no_images(channels, kernel, strides):
    operands = jnp.ones((0, 8, 8, channels)), jnp.ones((kernel, kernel, channels, 16))
    y = jax.eval_shape(lambda x, k: conv2d(x, k, strides, ONE), *operands)
    assert y.shape[0] == 0


# For the chosen implementations: height, width, channels, features, kernel and spec.
CHOSEN = [
    (8, 8, 3, 4, (3, 3), ConvSpec((1, 1), ONE)),
    (8, 7, 4, 6, (3, 3), ConvSpec((2, 2), ONE, (1, 1), 2)),
    (9, 8, 4, 8, (1, 1), ConvSpec((2, 2))),
    (16, 15, 3, 4, (7, 7), ConvSpec((2, 2), ((3, 3), (3, 3)))),
    (12, 13, 6, 6, (3, 3), ConvSpec((1, 1), ((2, 2), (2, 2)), (2, 2), 3)),
    (13, 12, 4, 4, (3, 3), ConvSpec((2, 3), ((2, 1), (0, 3)), (2, 1), 4)),
    (11, 11, 2, 4, (2, 5), ConvSpec((3, 2), ((0, 0), (1, 0)), (1, 2), 2)),
    (9, 9, 2, 2, (3, 3), ConvSpec((4, 4), ONE)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CHOSEN)
def test_values_and_gradients_are_those_of_jax(case):
    operands, spec = _operands(*case), case[-1]
    actual, expected = (
        compiled_value_and_vjp(function, *operands)
        for function in (lambda x, k: conv2d(x, k, *spec), partial(_xla_convolution, spec))
    )
    assert_close_in_norm(actual, expected, 1e-13)


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    operands, spec = _operands(*CHOSEN[1]), CHOSEN[1][-1]

    def curvature(f):
        inner = jax.grad(lambda x, k: jnp.sum(f(x, k) ** 3), argnums=1)
        outer = jax.grad(lambda x, k: jnp.sum(inner(x, k) ** 2), argnums=(0, 1))
        return jax.jit(outer)(*operands)

    ours = curvature(lambda x, k: conv2d(x, k, *spec))
    expected = curvature(partial(_xla_convolution, spec))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def _layouts(platform):
    """Dimension numbers of every convolution in the lowered gradient."""
    x, k = (leaf.astype(np.float32) for leaf in _operands(*CHOSEN[1]))
    spec = CHOSEN[1][-1]
    gradient = jax.jit(jax.grad(lambda x, k: conv2d(x, k, *spec).sum() ** 2, argnums=(0, 1)))
    text = gradient.trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"dim_numbers = (\[[^,]*.*?\]->\[.*?\])", text)


def test_on_cpu_every_convolution_is_canonical_and_elsewhere_jax_decides():
    canonical = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert _layouts("cpu") == [canonical] * 3
    assert len(_layouts("cuda")) == 3
    assert set(_layouts("cuda")) != {canonical}
