"""Gradients by the implementations chosen for this device, compared with the reference ones on it.

    python benchmarks/same_on_device.py

Prints the largest relative difference of any parameter's gradient, in float64 and, where rounding
dominates it, in bfloat16. The exit status is 1 where float64 differs by more than 1e-10.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax import create_model
from resnet_flax.ops import dispatch

PLAIN = {
    "forward": "conv",
    "input_gradient": "native",
    "kernel_gradient": "native",
    "pooling": "native",
    "statistics": "two_pass",
    "fusion": "free",
    "conv_bn_1x1": "unfused",
    "conv_bn_3x3": "unfused",
}
SMALL = {"stage_sizes": (2, 1), "stage_features": (8, 16)}
NETWORKS: list[tuple[str, dict[str, Any], int, int]] = [
    ("resnet50", SMALL, 64, 4),
    ("resnet18", SMALL, 33, 4),
    ("cifar_resnet20", {}, 32, 16),
]


def difference(name: str, axes: dict[str, Any], side: int, batch: int, dtype: Any) -> float:
    """The largest distance of a parameter's gradients, relative to the reference one's norm."""
    exact = jnp.float64 if dtype == jnp.float64 else jnp.float32
    model = create_model(name, num_classes=5, **axes, dtype=dtype, param_dtype=exact)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, side, side, 3)), dtype)
    variables = jax.jit(lambda key: model.init(key, x, train=False))(jax.random.key(0))
    # Scales of zero would hide the gradients of the layers before them.
    variables = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1, leaf.dtype), variables)

    def gradient(**overrides: str) -> Any:
        def loss(params: Any) -> Any:
            with dispatch.override(**overrides):
                given = {**variables, "params": params}
                logits, _ = model.apply(given, x, train=True, mutable=["batch_stats"])
            return (logits**2).sum()

        return jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))

    plain = jax.tree.leaves(gradient(**PLAIN))
    # The choice for this type, then that for bfloat16. Our own kernels exist in bfloat16 only.
    others = [{}, {"conv_bn_1x1": "fused"}]
    if dtype == jnp.bfloat16:
        others.append({"conv_bn_3x3": "triton"})
    found = [jax.tree.leaves(gradient(**overrides)) for overrides in others]
    pairs = [pair for leaves in found for pair in zip(leaves, plain, strict=True)]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) for a, b in pairs)


def main() -> int:
    """Compares all networks; returns the exit status."""
    jax.config.update("jax_enable_x64", True)
    print(jax.devices()[0].device_kind)
    worst = 0.0
    for dtype in (jnp.float64, jnp.bfloat16):
        for name, axes, side, batch in NETWORKS:
            found = difference(name, axes, side, batch, dtype)
            print(f"{name:16} {jnp.dtype(dtype).name:8} {found:.1e}", flush=True)
            worst = max(worst, found if dtype == jnp.float64 else 0.0)
    return int(worst > 1e-10)


if __name__ == "__main__":
    sys.exit(main())
