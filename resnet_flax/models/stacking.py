"""Between the variables of a scanned network and those of an unrolled one."""

import re
from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = re.compile(r"stage(\d+)_block(\d+)")
_BLOCKS = re.compile(r"stage(\d+)_blocks")


def stack(variables: Any) -> Any:
    """For `scan=True`: the second and later blocks of stage n stacked as `stagen_blocks`.

    Args:
      variables: a tree whose keys below `params` and `batch_stats` are blocks' names, such as
        `model.init` gives with `scan=False`. What is no block stays.
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
