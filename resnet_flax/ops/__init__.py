"""The operations of residual networks, on arrays, with implementations for each device.

Depends on JAX only: no Flax, no config, no mesh.
"""

from resnet_flax.ops.batch_norm import add_relu, batch_norm, relu, wide
from resnet_flax.ops.conv import conv2d
from resnet_flax.ops.conv_batch_norm import conv_batch_norm, fused
from resnet_flax.ops.dispatch import override, target
from resnet_flax.ops.max_pool import max_pool
from resnet_flax.ops.spec import BatchNormSpec, ConvSpec, is_symbolic, output_size

__all__ = [
    "BatchNormSpec",
    "ConvSpec",
    "add_relu",
    "batch_norm",
    "conv2d",
    "conv_batch_norm",
    "fused",
    "is_symbolic",
    "max_pool",
    "output_size",
    "override",
    "relu",
    "target",
    "wide",
]
