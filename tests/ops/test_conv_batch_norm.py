"""When a convolution and the batch normalisation of its output are fused."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernel_operands import ONE, fused_3x3_operands

from resnet_flax import ops
from resnet_flax.evaluation.compile import jit
from resnet_flax.models import create_model
from resnet_flax.ops import BatchNormSpec, ConvSpec, dispatch, heuristics
from resnet_flax.ops.spec import NormalizedConv
from resnet_flax.runtime import xla_options

ONE_GPU = xla_options.Options({}, single_gpu=True)


def test_whether_a_1x1_convolution_is_fused_is_decided_by_device_and_shape():
    def fused(side, channels, features, groups=1, dtype=jnp.bfloat16):
        kernel = (1, 1, channels, features)
        conv = NormalizedConv(side**2, kernel, ConvSpec(), dtype)
        chosen = heuristics.batch_norm_implementation(conv, groups)
        found = [it.conv_bn_1x1 == "fused" for it in (chosen.cpu, chosen.gpu, chosen.tpu)]
        types = {"dtype": dtype, "param_dtype": jnp.float32, "groups": groups}
        for batch in (0, 2):  # without images there is nothing to fuse
            shape = (batch, side, side, channels)
            one = ops.fused(shape, kernel, ConvSpec(), **types)
            assert (one is not None) == (any(found) and batch > 0)
        return found

    only_gpu, never = [False, True, False], [False] * 3
    assert fused(56, 64, 256) == fused(14, 256, 1024) == only_gpu
    assert fused(56, 256, 64) == fused(7, 512, 2048) == never
    assert fused(56, 64, 256, groups=2) == fused(56, 64, 256, dtype=jnp.float32) == never
    with dispatch.override(conv_bn_1x1="fused"):
        assert fused(1, 64, 64) == [True] * 3
        assert fused(1, 64, 64, groups=2) == never

    def products(platform):
        """Number of matrix products in the program of a block's forward pass."""
        small = {"stage_sizes": (1,), "stage_features": (8,), "num_classes": 2}
        model = create_model("resnet50", **small, dtype=jnp.bfloat16)
        x = jnp.ones((4, 64, 64, 3))
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        run = partial(model.apply, train=True, mutable=["batch_stats"])
        program = jax.jit(run).trace(variables, x).lower(lowering_platforms=(platform,))
        return program.as_text().count("stablehlo.dot_general")

    # The head; three 1x1 kernels; the moments of the last one's input, and their product with it.
    assert [products(platform) for platform in ("tpu", "cpu", "cuda")] == [1, 1 + 3, 1 + 3 + 2]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_a_gpu_program_has_the_3x3_kernels_and_another_has_not():
    operands, running = fused_3x3_operands(2, 8, 16, 16, 1, True, jnp.bfloat16)
    singles = [leaf.astype(jnp.float32) for leaf in operands[1:4]]
    operands = operands[0], *singles, operands[4]
    running = tuple(leaf.astype(jnp.float32) for leaf in running)

    def loss(x, kernel, scale, bias, residual):
        conv_spec = ConvSpec((1, 1), ONE)
        types = {"dtype": x.dtype, "param_dtype": kernel.dtype}
        found = ops.fused(x.shape, kernel.shape, conv_spec, **types)
        norm_spec = BatchNormSpec(
            1, 1e-5, True, x.dtype, jnp.float32, found or heuristics.batch_norm_implementation()
        )
        if found is None:
            z = ops.conv2d(x, kernel.astype(x.dtype), *conv_spec)
            y, _, _ = ops.batch_norm(norm_spec, z, scale, bias, residual, running[0])
        else:
            y, _ = ops.conv_batch_norm(
                norm_spec, conv_spec, x, kernel, scale, bias, residual, running
            )
        return y.astype(jnp.float32).sum()

    def kernels_of(platform, options):
        program = jit(jax.grad(loss, argnums=(0, 1)), options).trace(*operands)
        return program.lower(lowering_platforms=(platform,)).as_text().count("gpu$xla.gpu.triton")

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert kernels_of("cuda", ONE_GPU) == 5  # convolve, normalise; sum, through it, back
        assert kernels_of("cuda", None) == kernels_of("cpu", ONE_GPU) == 0
