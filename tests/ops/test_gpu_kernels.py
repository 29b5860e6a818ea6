"""Our own kernels for GPUs, interpreted: the same numbers, and chosen only where they pay."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from variables import drawn

from resnet_flax import create_model, ops
from resnet_flax.evaluation.compile import jit
from resnet_flax.ops import (
    BatchNormSpec,
    ConvSpec,
    dispatch,
    gpu_kernel_parts,
    gpu_kernels,
    heuristics,
)
from resnet_flax.ops.dispatch import ByDevice
from resnet_flax.ops.fused_3x3 import conv_batch_norm_3x3
from resnet_flax.ops.spec import NormalizedConv
from resnet_flax.runtime import xla_options
from resnet_flax.training.steps import statistics_step

ONE = ((1, 1), (1, 1))
ON_GPU = xla_options.Options({}, single_gpu=True)


def _operands(batch, side, channels, features, stride, residual, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = [(batch, side, side, channels), (3, 3, channels, features), features, features]
    x, kernel, scale, bias = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    added = jnp.asarray(rng.normal(size=(batch, side // stride, side // stride, features)))
    running = jnp.asarray(rng.normal(size=features)), jnp.asarray(rng.uniform(1, 2, features))
    maps = x.astype(dtype), added.astype(dtype) if residual else None
    return (maps[0], kernel, scale, bias, maps[1]), running


def _run(conv_bn_3x3, stride, relu, running, x, kernel, scale, bias, residual):
    """Activations, batch's moments and running ones, so that no device's way is that of all."""
    way = dispatch.BatchNormImplementation("one_pass", conv_bn_3x3=conv_bn_3x3)
    other = way._replace(conv_bn_3x3="unfused" if conv_bn_3x3 == "triton" else "triton")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    types = x.dtype, wide, ByDevice(way, other, other)
    spec, geometry = (
        BatchNormSpec(1, 1e-5, relu, *types, 0.7, 1.25),
        ConvSpec((stride, stride), ONE),
    )
    return conv_batch_norm_3x3(spec, geometry, x, kernel, scale, bias, residual, running)


def _gradients(function, *operands):
    """What it returns, and the gradients of all of that weighted unevenly."""

    @jax.jit
    def both(*operands):
        found, vjp = jax.vjp(function, *operands)
        weights = jax.tree.map(_uneven, found)
        return found, vjp(weights)

    return both(*operands)


def _uneven(leaf):
    return jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape).astype(leaf.dtype)


def _close(actual, expected, limit):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float(jnp.abs(a - b).max()) <= limit * float(jnp.abs(b).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "relu", "residual"),
    [
        ((3, 8, 16, 16, 1), True, True),
        ((2, 8, 32, 32, 1), True, False),
        ((3, 8, 64, 64, 1), False, True),
        ((1, 16, 16, 16, 1), False, False),
        ((3, 16, 3, 16, 1), True, False),  # a stem
        ((2, 16, 16, 32, 2), True, True),  # where a stage begins
    ],
)
def test_the_same_as_one_after_the_other(shape, relu, residual):
    operands, running = _operands(*shape, residual)
    apart, ours = (
        _gradients(partial(_run, way, shape[-1], relu, running), *operands)
        for way in ("unfused", "triton")
    )
    _close(ours, apart, 1e-13)


@pytest.mark.usefixtures("x64")
def test_programs_that_take_several_turns_and_shares_of_no_power_of_two(monkeypatch):
    # 7 images of 8x8: 7 tiles of 64 positions; of 16 images' 16 tiles programs take 2 or 4.
    for name in ("CONVOLVE", "GRADIENTS", "SUM", "APPLY"):
        monkeypatch.setattr(gpu_kernels, name, {16: gpu_kernel_parts.Tile(64, 4)})
    for batch, most, programs in ((7, 512, 7), (16, 8, 8), (16, 5, 4)):
        monkeypatch.setattr(gpu_kernel_parts, "MOST", most)
        monkeypatch.setattr(gpu_kernel_parts, "ADDED_UP", 16 * (8 if most == 512 else 2))
        assert gpu_kernel_parts.cut(64 * batch, gpu_kernels.SUM[16])[1] == programs
        operands, running = _operands(batch, 8, 16, 16, 1, True)
        apart, ours = (
            _gradients(partial(_run, way, 1, True, running), *operands)
            for way in ("unfused", "triton")
        )
        _close(ours, apart, 1e-13)


@pytest.mark.usefixtures("x64")
def test_second_derivatives():
    operands, running = _operands(1, 8, 16, 16, 1, True)

    def product(way):
        """Of the Hessian of a function of all operands with a vector."""

        def function(*operands):
            (y, mean, var), _ = _run(way, 1, True, running, *operands)
            return (y**3).sum() + (mean * var).sum()

        every = tuple(range(len(operands)))

        def slope(*operands):
            found = jax.grad(function, argnums=every)(*operands)
            return sum((jnp.sin(leaf) ** 2).sum() for leaf in found)

        return jax.jit(jax.grad(slope, argnums=every))(*operands)

    _close(product("triton"), product("unfused"), 1e-11)


def test_in_bfloat16_as_near_as_one_after_the_other():
    operands, running = _operands(4, 8, 32, 32, 1, True, jnp.bfloat16)
    exact, *rounded = (
        _gradients(partial(_run, way, 1, True, running), *given)
        for way, given in (
            (
                "unfused",
                (operands[0].astype(jnp.float32), *operands[1:4], operands[4].astype(jnp.float32)),
            ),
            ("unfused", operands),
            ("triton", operands),
        )
    )

    def distances(found):
        return [
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        ]

    apart, ours = (distances(found) for found in rounded)
    assert max(apart) < 0.05
    assert all(b <= 1.5 * a + 1e-6 for a, b in zip(apart, ours, strict=True)), (apart, ours)


@pytest.mark.usefixtures("x64")
def test_a_network_is_the_same():
    axes = {"stage_sizes": (1, 1), "stage_features": (16, 32)}
    types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = create_model("cifar_resnet20", num_classes=5, **axes, **types)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1), drawn(model, x))

    def gradients(way):
        def loss(params):
            with dispatch.override(conv_bn_3x3=way):
                logits, updated = model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
            return (logits**2).sum(), (logits, updated)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    _close(gradients("triton"), gradients("unfused"), 1e-10)


def _chosen(behind, groups=1):
    ways = heuristics.normalisation(behind, groups)
    return [way.conv_bn_3x3 == "triton" for way in (ways.cpu, ways.gpu, ways.tpu)]


def _behind(side=32, channels=16, features=16, stride=1, dtype=jnp.bfloat16, size=3, groups=1):
    geometry = ConvSpec((stride, stride), (((size // 2,) * 2),) * 2, (1, 1), groups)
    return NormalizedConv(side * side, (size, size, channels // groups, features), geometry, dtype)


def test_what_they_are_chosen_for(monkeypatch):
    only_gpu, never = [False, True, False], [False] * 3
    assert _chosen(_behind()) == never  # it may run on several
    with ops.target(single_gpu=True):
        for fits in (
            _behind(),
            _behind(16, 32, 32),
            _behind(8, 64, 64),
            _behind(channels=3),
            _behind(16, 16, 32, 2),
        ):
            assert _chosen(fits) == only_gpu
            assert _chosen(fits, groups=2) == never
        for other in (
            _behind(56, 64, 64),
            _behind(features=24),
            _behind(features=128),
            _behind(dtype=jnp.float32),
            _behind(dtype=jnp.float16),
            _behind()._replace(batch=257),  # does not compile: shared memory
            _behind()._replace(parameters=jnp.bfloat16),
            _behind(16, 64, 64),
            _behind(28),
            _behind(size=1),
            _behind(size=7),
            _behind(groups=4),
        ):
            assert _chosen(other) == never
        monkeypatch.setattr(dispatch, "has_triton", lambda: False)
        assert _chosen(_behind()) == never
    with dispatch.override(conv_bn_3x3="triton"):
        assert _chosen(_behind(dtype=jnp.float32)) == [True] * 3
        assert _chosen(_behind(), groups=2) == never
        assert _chosen(_behind(size=1)) == _chosen(_behind(features=24)) == never


def test_programs_of_one_hopper_gpu_know_it():
    def devices(kind, number=1):
        return [SimpleNamespace(device_kind=kind)] * number

    def one_gpu(found):
        return xla_options.options("gpu", (32, 32, 3), "bfloat16", devices=found) == ON_GPU

    assert one_gpu(devices("NVIDIA H200"))
    assert one_gpu(devices("NVIDIA H100 80GB HBM3"))
    assert not one_gpu(devices("NVIDIA H200", 2))
    assert not one_gpu(devices("NVIDIA A100-SXM4-40GB"))  # less shared memory
    assert not one_gpu(devices("gfx942"))
    assert not one_gpu(())


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_a_gpu_program_has_them_and_another_has_not():
    operands, running = _operands(2, 8, 16, 16, 1, True, jnp.bfloat16)
    singles = [leaf.astype(jnp.float32) for leaf in operands[1:4]]
    operands = operands[0], *singles, operands[4]
    running = tuple(leaf.astype(jnp.float32) for leaf in running)

    def loss(x, kernel, scale, bias, residual):
        geometry = ConvSpec((1, 1), ONE)
        types = {"dtype": x.dtype, "param_dtype": kernel.dtype}
        found = ops.fused(x.shape, kernel.shape, geometry, **types)
        spec = BatchNormSpec(
            1, 1e-5, True, x.dtype, jnp.float32, found or heuristics.normalisation()
        )
        if found is None:
            z = ops.conv2d(x, kernel.astype(x.dtype), *geometry)
            y, _, _ = ops.batch_norm(spec, z, scale, bias, residual, running[0])
        else:
            y, _ = ops.conv_batch_norm(spec, geometry, x, kernel, scale, bias, residual, running)
        return y.astype(jnp.float32).sum()

    def kernels_of(platform, options):
        program = jit(jax.grad(loss, argnums=(0, 1)), options).trace(*operands)
        return program.lower(lowering_platforms=(platform,)).as_text().count("gpu$xla.gpu.triton")

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert kernels_of("cuda", ON_GPU) == 5  # convolve, normalise; sum, through it, back
        assert kernels_of("cuda", None) == kernels_of("cpu", ON_GPU) == 0


def test_statistics_of_the_end_of_a_training_are_not_by_kernels(monkeypatch):
    """They are about zeros, where one pass loses digits."""
    model = create_model(
        "cifar_resnet20", num_classes=5, stage_sizes=(1,), stage_features=(16,), dtype=jnp.bfloat16
    )
    x = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    variables = drawn(model, x)
    seen = []
    monkeypatch.setattr(gpu_kernels, "convolve", lambda *_: seen.append(1))
    batch = {"image": x, "label": jnp.zeros(2, jnp.int32)}
    with ops.target(single_gpu=True):
        prepare = lambda images, labels, step: (images, labels)  # noqa: E731
        step = partial(statistics_step, model=model, prepare=prepare)
        jax.eval_shape(step, variables["params"], batch, 0, variables["batch_stats"])
        assert not seen
        training = partial(model.apply, train=True, mutable=["batch_stats"])
        with pytest.raises(TypeError):  # training itself is
            jax.eval_shape(training, variables, x)
        assert seen
