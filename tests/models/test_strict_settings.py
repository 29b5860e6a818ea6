"""Networks under JAX's strict settings, which refuse implicit conversions."""

import jax
import jax.numpy as jnp
import kinds
import pytest


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_networks_need_no_implicit_promotion(kind, dtype):
    model = kinds.network(kind, dtype=dtype, param_dtype=jnp.float32)
    x = jax.ShapeDtypeStruct((2, kinds.SIDE, kinds.SIDE, 3), jnp.float32)

    def loss(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits.astype(jnp.float32).sum(), updated

    # Tracing suffices: all refusals happen in it, for every device.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
        params, batch_stats = made["params"], made.get("batch_stats", {})
        gradients, _ = jax.eval_shape(jax.grad(loss, has_aux=True), params, batch_stats, x)
        logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), made, x)
    assert jax.tree.map(lambda leaf: leaf.shape, gradients) == jax.tree.map(
        lambda leaf: leaf.shape, params
    )
    assert logits.shape == (2, 3)
