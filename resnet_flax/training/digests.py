"""Checksums of arrays and of JSON."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def digests(tree: Any) -> dict[str, int]:
    """An integer checksum of every leaf, by path, computed on the devices whatever the sharding.

    Each 32 bits of a leaf are hashed together with their position, and the hashes are summed
    modulo 2**32. The sum does not depend on the order, and so not on the sharding. As the hash is a
    bijection for every position, a change of any one element changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One after another: a hundred programs with collectives in flight can starve each other of
    # threads on XLA's CPU backend, which then aborts.
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(_digest(leaf))
        for path, leaf in leaves
    }


@jax.jit
def _digest(leaf: Array) -> UInt32[Array, ""]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):  # not a reshape, which would move sharded data
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return _mix(bits ^ _mix(position + jnp.uint32(1))).sum(dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """A bijection of 32 bits in which every output bit depends on every input bit.

    Constants: C. Wellons, "Prospecting for hash functions", lowbias32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def sha256_of(value: Any) -> str:
    """The SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
