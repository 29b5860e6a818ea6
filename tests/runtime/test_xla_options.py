"""XLA's compiler options: only where they pay, and with the results of XLA's own kernels."""

import os
import platform
import subprocess
import sys
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import sharding
from resnet_flax.apply.experiment import make_programs
from resnet_flax.apply.tables import check, override
from resnet_flax.config import load_config
from resnet_flax.evaluation.compile import jit
from resnet_flax.ops import conv2d
from resnet_flax.ops.conv import FORWARD
from resnet_flax.ops.dispatch import current_target
from resnet_flax.ops.spec import ConvSpec
from resnet_flax.runtime import compilation_cache, xla_options

CIFAR, PHOTOGRAPH, DIGIT = (32, 32, 3), (224, 224, 3), (8, 8, 1)

# JAX's wheels for other processors, and those before 0.11, do not contain oneDNN.
VERSION = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])
THERE = VERSION >= (0, 11) and platform.machine() == "x86_64"

needs_onednn = pytest.mark.skipif(not THERE, reason="this JAX has no oneDNN")


@pytest.fixture(autouse=True)
def not_cached(monkeypatch):
    """Runs each test as in a new process, without cached decisions of others."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    before = _least()
    compilation_cache.resume(0.3)  # other tests of this process may have stopped it
    xla_options.has_onednn.cache_clear()
    yield
    xla_options.has_onednn.cache_clear()
    jax.config.update(compilation_cache.KEPT_FROM, before)


def _least():
    return jax.config.jax_persistent_cache_min_compile_time_secs


def test_where_it_pays():
    found = xla_options.options("cpu", CIFAR, "float32")
    assert (found is not None) == THERE
    assert xla_options.options("cpu", PHOTOGRAPH, "float32") == found
    assert xla_options.options("cpu", CIFAR, "float32", training=False) == found
    assert xla_options.options("cpu", PHOTOGRAPH, "float32", training=False) is None
    assert xla_options.options("cpu", DIGIT, "float32") is None
    assert xla_options.options("gpu", CIFAR, "float32") is None
    assert xla_options.options("tpu", CIFAR, "float32") is None


@pytest.mark.parametrize("name", xla_options.ONEDNN)
def test_what_the_user_says_goes_before(monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=")
    assert xla_options.options("cpu", CIFAR, "float32") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"xla_cpu_no_such_option": True},
        {**xla_options.ONEDNN, "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_NEW"},
        {"xla_cpu_enable_fast_math": False},  # a known option, without oneDNN
    ],
)
def test_a_compiler_without_it_has_its_defaults_and_keeps_programs(monkeypatch, wrong):
    monkeypatch.setattr(xla_options, "ONEDNN", wrong)
    before = _least()
    assert xla_options.options("cpu", CIFAR, "float32") is None
    assert _least() == before < float("inf")


def test_types_that_were_not_measured_have_the_defaults():
    assert xla_options.options("cpu", CIFAR, "float64") is None
    assert xla_options.options("cpu", CIFAR, "float16") is None


def test_where_the_user_has_all_by_onednn_convolutions_are_chosen_for_it(monkeypatch):
    assert not current_target().onednn
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_onednn_custom_call=true")
    assert current_target().onednn
    assert xla_options.options("cpu", CIFAR, "float32") is None


def test_a_program_keeps_its_name_and_takes_arguments_by_name():
    def add(a, b):
        assert current_target().single_gpu
        assert not current_target().onednn
        return a + b

    options = xla_options.Options({"xla_cpu_enable_fast_math": False}, single_gpu=True)
    program = jit(partial(add, b=1), options)
    assert program(a=1) == 2
    assert not current_target().single_gpu
    assert "jit_add" in program.lower(1).as_text()


def test_programs_of_one_hopper_gpu_know_it():
    def devices(kind, number=1):
        return [SimpleNamespace(device_kind=kind)] * number

    def one_gpu(found):
        return xla_options.options(
            "gpu", (32, 32, 3), "bfloat16", devices=found
        ) == xla_options.Options({}, single_gpu=True)

    assert one_gpu(devices("NVIDIA H200"))
    assert one_gpu(devices("NVIDIA H100 80GB HBM3"))
    assert not one_gpu(devices("NVIDIA H200", 2))
    assert not one_gpu(devices("NVIDIA A100-SXM4-40GB"))  # less shared memory
    assert not one_gpu(devices("gfx942"))
    assert not one_gpu(())


@needs_onednn
def test_small_images_programs_are_kept_still():
    before = _least()
    assert jit(abs, xla_options.options("cpu", DIGIT, "float32"))(-1) == 1
    options = xla_options.options("cpu", CIFAR, "float32")
    assert _least() == before  # asking changes nothing
    jit(abs, options)
    assert _least() == float("inf")
    compilation_cache.resume(before)  # as `compilation_cache.enable` may
    jit(abs, options)
    assert _least() == float("inf")


@needs_onednn
def test_nothing_is_said_where_programs_would_be_kept(tmp_path):
    program = (
        "import jax, jax.numpy as jnp\n"
        "from resnet_flax.evaluation.compile import jit\n"
        "from resnet_flax.runtime import xla_options\n"
        "options = xla_options.options('cpu', (32, 32, 3), 'float32')\n"
        "x = jnp.ones((1024, 1024))\n"
        "product = jit(lambda x: x @ x, options)\n"
        "assert '__onednn' in product.lower(x).compile().as_text()\n"
        "print(float(product(x).sum()))\n"
    )
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == 1024.0**3


def _programs(dtype):
    config = load_config("configs/cifar10.py:resnet20")
    override(config, ["model.name=cifar_resnet8", "batch_size=16", f"model.dtype={dtype}"])
    return make_programs(check(config), sharding.make_mesh(), 10, CIFAR)[1]


def _step(programs):
    """One step's change of all parameters, concatenated, its loss and its program."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, *CIFAR), np.uint8),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "mask": np.ones(16, bool),
    }
    batch = sharding.put_batch(batch, sharding.make_mesh())
    before = programs.init(0)
    start = jax.tree.map(jnp.copy, before.params)
    step = programs.train_step.lower(before, batch, 0).compile()
    state, sums = step(before, batch, 0)
    moved = jax.tree.map(lambda a, b: (a - b).ravel(), state.params, start)
    return jnp.concatenate(jax.tree.leaves(moved)), float(sums["loss"]), step.as_text()


@needs_onednn
def test_a_step_over_several_devices_is_that_of_xla_s_own_kernels(monkeypatch):
    # In bfloat16 if the processor supports it.
    dtypes = [d for d in ("float32", "bfloat16") if xla_options.options("cpu", CIFAR, d)]
    found = {}
    for dtype in dtypes:
        found[dtype], loss, program = _step(_programs(dtype))
        assert "__onednn$convolution" in program
        with monkeypatch.context() as patched:
            patched.setattr(xla_options, "options", lambda *_, **__: None)
            found[dtype, "own"], expected_loss, program = _step(_programs(dtype))
        assert "__onednn" not in program
        assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-3)

    def off(name):
        expected = found["float32", "own"]
        return jnp.linalg.norm(found[name] - expected) / jnp.linalg.norm(expected)

    assert "float32" in dtypes
    assert off("float32") < 1e-5
    if "bfloat16" in dtypes:
        assert off("bfloat16") < 1.5 * off(("bfloat16", "own"))  # both within rounding


# Height, input and output channels, strides, kernel, groups, dilation.
SHAPES = [
    (32, 1, 16, 1, 3, 1, 1),
    (32, 3, 16, 1, 3, 1, 1),
    (64, 3, 32, 2, 7, 1, 1),
    (32, 16, 16, 1, 3, 1, 1),
    (32, 16, 32, 2, 3, 1, 1),
    (16, 32, 64, 2, 1, 1, 1),
    (7, 130, 34, 1, 3, 1, 1),
    (14, 256, 256, 1, 3, 1, 1),
    (14, 128, 128, 2, 3, 1, 1),
    (8, 2, 16, 1, 7, 1, 1),
    (8, 4, 16, 1, 7, 1, 1),
    (32, 16, 4, 1, 3, 1, 1),
    (32, 16, 16, 1, 5, 1, 1),
    (32, 16, 16, 1, 3, 1, 2),
    (32, 32, 32, 1, 3, 8, 1),
    (32, 32, 64, 2, 3, 32, 1),
]


@needs_onednn
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_and_gradients_by_onednn(shape, dtype, most):
    """Especially small batches: kernel gradients as convolutions were wrong for those."""
    size, channels, features, stride, k, groups, dilation = shape
    pad = dilation * (k // 2)
    spec = ConvSpec((stride,) * 2, ((pad, pad),) * 2, (dilation,) * 2, groups)
    rng = np.random.default_rng(0)

    def all_three(convolve, x, kernel, dy):
        y, back = jax.vjp(convolve, x, kernel)
        return y, *back(dy)

    def plain(x, kernel):
        return FORWARD["conv"](spec, x, kernel)

    def ours(x, kernel):
        return conv2d(x, kernel, *spec)

    for batch in (1, 2, 4):
        shapes = (batch, size, size, channels), (k, k, channels // groups, features)
        x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
        dy = jnp.asarray(rng.normal(size=jax.eval_shape(plain, x, kernel).shape), dtype)
        options = xla_options.options("cpu", CIFAR, dtype)
        program = jit(partial(all_three, ours), options).lower(x, kernel, dy).compile()
        if options and groups == 1 and k > 1:  # oneDNN does not get small products
            assert "__onednn" in program.as_text()
        found = program(x, kernel, dy)
        wide = (leaf.astype(jnp.float32) for leaf in (x, kernel, dy))
        for one, expected in zip(found, jax.jit(partial(all_three, plain))(*wide), strict=True):
            off = jnp.linalg.norm((one.astype(jnp.float32) - expected).ravel())
            assert off < most * jnp.linalg.norm(expected.ravel())
