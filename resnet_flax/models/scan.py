"""Stacking and unstacking blocks' parameters, and the loop over stacked blocks."""

import re
from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = re.compile(r"stage(\d+)_block(\d+)")
_BLOCKS = re.compile(r"stage(\d+)_blocks")


def stack(variables: Any) -> Any:
    """For `scan=True`: the second and later blocks of stage n stacked as `stagen_blocks`.

    Args:
      variables: a tree whose keys below `params` and `batch_stats` are names of blocks, such as
        from `model.init` with `scan=False`. Other keys are kept.
    """
    result: dict[str, dict[str, Any]] = {}
    for collection, tree in variables.items():
        later: dict[str, dict[int, Any]] = {}
        result[collection] = {}
        for name, branch in tree.items():
            block = _BLOCK.fullmatch(name)
            if block and int(block[2]) > 1:
                later.setdefault(f"stage{block[1]}_blocks", {})[int(block[2])] = branch
            else:
                result[collection][name] = branch
        for name, blocks in later.items():
            in_order = [blocks[number] for number in sorted(blocks)]
            result[collection][name] = jax.tree.map(lambda *x: jnp.stack(x), *in_order)
    return result


def unstack(variables: Any) -> Any:
    """For `scan=False`: the inverse of `stack`."""
    result: dict[str, dict[str, Any]] = {}
    for collection, tree in variables.items():
        result[collection] = {}
        for name, branch in tree.items():
            blocks = _BLOCKS.fullmatch(name)
            if not blocks:
                result[collection][name] = branch
                continue
            for i in range(len(jax.tree.leaves(branch)[0])):
                one = jax.tree.map(lambda x, i=i: x[i], branch)
                result[collection][f"stage{blocks[1]}_block{i + 2}"] = one
    return result


def scan_in_groups(body: Any, x: Any, xs: Any, length: int, size: int) -> tuple[Any, Any]:
    """`jax.lax.scan` that saves only every `size`-th iteration's carry for the backward pass.

    Args:
      body: of the loop, `(carry, slice) -> (carry, y)`.
      x: the first carry.
      xs: scanned over the first axis of each leaf, which has `length` entries.
      length: number of iterations; need not be a multiple of `size`.
      size: iterations in a group, which the backward pass recomputes; 0 saves everything.
    """

    def loop(x: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.scan(body, x, xs)

    if not size:
        return loop(x, xs)
    whole, rest = divmod(length, size)
    # XLA cannot merge a loop's body with code outside, but inlines a loop of one iteration.
    group = jax.checkpoint(loop, prevent_cse=whole == 1)
    done, ys = whole * size, []
    if whole:
        cut = jax.tree.map(lambda a: a[:done].reshape(whole, size, *a.shape[1:]), xs)
        x, y = jax.lax.scan(group, x, cut)
        ys.append(jax.tree.map(lambda a: a.reshape(done, *a.shape[2:]), y))
    if rest:
        x, y = jax.checkpoint(loop)(x, jax.tree.map(lambda a: a[done:], xs))
        ys.append(y)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *ys)
