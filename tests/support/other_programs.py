"""Residual networks of other programs, plainly: their names, and what they compute in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# For each program: the stem's names, those of the layer i of block b of stage s (all from 1, but
# for the block), those of its projection, and that of the head.
NAMES = {
    "kuangliu": (
        ("conv1", "bn1"),
        lambda s, b, i: (f"layer{s}.{b}.conv{i}", f"layer{s}.{b}.bn{i}"),
        lambda s, b: (f"layer{s}.{b}.shortcut.0", f"layer{s}.{b}.shortcut.1"),
        "linear",
    ),
    "chenyaofo": (
        ("conv1", "bn1"),
        lambda s, b, i: (f"layer{s}.{b}.conv{i}", f"layer{s}.{b}.bn{i}"),
        lambda s, b: (f"layer{s}.{b}.downsample.0", f"layer{s}.{b}.downsample.1"),
        "fc",
    ),
    "weiaicunzai": (
        ("conv1.0", "conv1.1"),
        lambda s, b, i: tuple(
            f"conv{s + 1}_x.{b}.residual_function.{3 * i - 3 + at}" for at in (0, 1)
        ),
        lambda s, b: tuple(f"conv{s + 1}_x.{b}.shortcut.{at}" for at in (0, 1)),
        "fc",
    ),
    "transformers": (
        tuple(f"resnet.embedder.embedder.{kind}" for kind in ("convolution", "normalization")),
        lambda s, b, i: tuple(
            f"resnet.encoder.stages.{s - 1}.layers.{b}.layer.{i - 1}.{kind}"
            for kind in ("convolution", "normalization")
        ),
        lambda s, b: tuple(
            f"resnet.encoder.stages.{s - 1}.layers.{b}.shortcut.{kind}"
            for kind in ("convolution", "normalization")
        ),
        "classifier.1",
    ),
}


def forward(get, x, program, *, depths, widths, bottleneck=False, stride_on=2, classes=3):
    """Logits `[b, classes]`.

    Args:
      get: from a name and a shape to an array.
      x: images, `[b, c, h, w]`.
      program: a key of `NAMES`.
      depths: blocks of each stage.
      widths: output channels of each stage, of which a bottleneck has a quarter inside.
      bottleneck: blocks of three layers, not two.
      stride_on: the layer of a bottleneck with the stride, 1 or 2.
      classes: outputs.
    """
    stem, layer, shortcut, head = NAMES[program]

    def conv_bn(names, x, features, side, stride=1):
        conv, norm = names
        kernel = get(f"{conv}.weight", (features, x.shape[1], side, side))
        x = lax.conv_general_dilated(x, kernel, (stride, stride), [(side // 2, side // 2)] * 2)
        scale, bias, mean, var = (
            get(f"{norm}.{leaf}", (features,))[:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    if program == "transformers":
        x = jax.nn.relu(conv_bn(stem, x, widths[0] // 4 if bottleneck else widths[0], 7, 2))
        pads = ((0, 0), (0, 0), (1, 1), (1, 1))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads)
    else:
        x = jax.nn.relu(conv_bn(stem, x, widths[0] // 4 if bottleneck else widths[0], 3))
    for s, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        for b in range(depth):
            stride = 2 if s > 1 and b == 0 else 1
            inner = width // 4 if bottleneck else width
            sides, features = (
                ((1, 3, 1), (inner, inner, width)) if bottleneck else ((3, 3), (width,) * 2)
            )
            y = x
            for i, (side, n) in enumerate(zip(sides, features, strict=True), start=1):
                at = stride_on if bottleneck else 1
                y = conv_bn(layer(s, b, i), y, n, side, stride if i == at else 1)
                y = y if i == len(sides) else jax.nn.relu(y)
            if stride > 1 or x.shape[1] != width:
                x = conv_bn(shortcut(s, b), x, width, 1, stride)
            x = jax.nn.relu(x + y)
    x = x.mean((2, 3))
    return x @ get(f"{head}.weight", (classes, x.shape[1])).T + get(f"{head}.bias", (classes,))


def shapes(program, **network):
    """The shapes of a network's weights by their names; see `forward`."""
    found = {}

    def note(name, shape):
        found[name] = shape
        return jnp.zeros(shape, jnp.float32)

    x = jax.ShapeDtypeStruct((1, 3, 64, 64), jnp.float32)
    jax.eval_shape(functools.partial(forward, note, program=program, **network), x)
    return found


def drawn(program, **network):
    """Float64 weights of a network by their names; see `forward`."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        values = rng.normal(size=shape)
        if len(shape) > 1:
            return values / np.sqrt(np.prod(shape[1:]))
        return 0.5 + np.abs(values) if name.endswith(("var", "weight")) else 0.3 * values

    return {name: draw(name, shape) for name, shape in shapes(program, **network).items()}


def assert_same(variables, model, arrays, program, side, **network):
    """Asserts that our network of random images gives the logits of `forward` in float64."""
    x = np.random.default_rng(1).normal(size=(2, side, side + 3, 3))
    channels_first = jnp.asarray(x.transpose(0, 3, 1, 2))
    expected = jax.jit(lambda a, x: forward(lambda n, _: a[n], x, program, **network))(
        arrays, channels_first
    )
    actual = jax.jit(lambda v: model.apply(v, jnp.asarray(x), train=False))(variables)
    assert actual.dtype == jnp.float64
    assert np.std(expected, axis=0).min() > 1e-3 * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= 1e-12 * np.abs(expected).max()
