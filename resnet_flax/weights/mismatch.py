"""How weights differ from what a network needs: the pattern first, then counts and examples."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from resnet_flax.errors import listed

Shapes = dict[str, tuple[int, ...]]

# Number and block of a stage, in torch's names and in those of this package.
_BLOCK = re.compile(r"(?:^|[./])(?:layer|stages\.|stage)(\d+)[._](?:blocks\.|block)?(\d+)[./]")

# The orders of a convolution's axes, as permutations of torch's OIHW.
_ORDERS = {
    (2, 3, 1, 0): "HWIO, as in Keras, TensorFlow and Flax",
    (0, 2, 3, 1): "OHWI, as in TensorFlow Lite and MLX",
    (3, 2, 0, 1): "OIHW, as in torch, not HWIO",
}

# Pairs of names are compared for a pattern; more than so many of each add nothing to it.
_COMPARED = 200


def explain(given: Shapes, wanted: Shapes) -> str:
    """Everything missing, unexpected or of another shape, in words; empty if nothing is.

    Args:
      given: shapes of the weights, by name.
      wanted: shapes that the network needs.
    """
    missing = {name: shape for name, shape in wanted.items() if name not in given}
    unexpected = {name: shape for name, shape in given.items() if name not in wanted}
    changed = {
        name: (given[name], shape)
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    }
    patterns = _blocks(given, wanted)
    if not patterns:
        patterns = _renamed(missing, unexpected)
    patterns += _axes(changed) or _widths(changed, wanted)
    examples = {
        "missing": list(missing),
        "unexpected": list(unexpected),
        "of another shape": [f"{n} {list(has)}, not {list(s)}" for n, (has, s) in changed.items()],
    }
    counts = [f"{len(n)} {what} ({listed(n)})" for what, n in examples.items() if n]
    return "; ".join([*patterns, *counts])


def _blocks(given: Shapes, wanted: Shapes) -> list[str]:
    """Other numbers of blocks, or blocks of other numbers of convolutions."""
    theirs, ours = stage_sizes(given), stage_sizes(wanted)
    if theirs and ours and theirs != ours:
        return [f"its stages have {_joined(theirs)} blocks, those of the network {_joined(ours)}"]
    convs = [_convolutions(given), _convolutions(wanted)]
    if all(convs) and convs[0] != convs[1]:
        return [f"its blocks have {convs[0]} convolutions, those of the network {convs[1]}"]
    return []


def stage_sizes(names: Iterable[str]) -> tuple[int, ...]:
    """The number of blocks of each stage, from the names."""
    blocks: dict[int, set[int]] = {}
    for match in map(_BLOCK.search, names):
        if match:
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    return tuple(1 + max(blocks[stage]) - min(blocks[stage]) for stage in sorted(blocks))


def _convolutions(names: Iterable[str]) -> int:
    """The number of convolutions of a block, from the names."""
    numbers = [re.search(r"[./]conv(\d)[./]", name) for name in names if _BLOCK.search(name)]
    return max((int(number[1]) for number in numbers if number), default=0)


def _joined(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _renamed(missing: Shapes, unexpected: Shapes) -> list[str]:
    """What is called differently, if that explains half of the names or more."""
    by_size: dict[tuple[int, ...], list[list[str]]] = {}
    for name, shape in islice(missing.items(), _COMPARED):
        by_size.setdefault(tuple(sorted(shape)), []).append(_words(name))
    rules: Counter[tuple[str, str]] = Counter()
    for name, shape in islice(unexpected.items(), _COMPARED):
        words = _words(name)
        rules.update({_difference(ours, words) for ours in by_size.get(tuple(sorted(shape)), ())})
    for (ours, theirs), count in rules.most_common(1):
        if 2 * count < min(len(missing), len(unexpected), _COMPARED) or count < 2:
            break
        if not ours:
            return [f"its names have {theirs} in addition"]
        if not theirs:
            return [f"its names lack {ours}"]
        return [f"{ours} of the network is called {theirs} in it"]
    return []


def _words(name: str) -> list[str]:
    return re.sub(r"\d+", "N", name).split(".")


def _difference(a: list[str], b: list[str]) -> tuple[str, str]:
    """The parts of two names that differ; numbers are written as N."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    return ".".join(a[start : len(a) - end]), ".".join(b[start : len(b) - end])


Changed = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _axes(changed: Changed) -> list[str]:
    """Convolutions whose axes are in another order."""
    kernels = [(has, needs) for has, needs in changed.values() if len(has) == len(needs) == 4]
    for order, name in _ORDERS.items():
        if kernels and all(has == tuple(needs[i] for i in order) for has, needs in kernels):
            return [f"the axes of {len(kernels)} convolutions are in the order {name}"]
    return []


def _widths(changed: Changed, wanted: Shapes) -> list[str]:
    """Other numbers of channels, which vectors tell in any layout; not where few of them differ."""
    vectors = {n: pair for n, pair in changed.items() if all(len(shape) == 1 for shape in pair)}
    if not vectors or 4 * len(vectors) < sum(len(shape) == 1 for shape in wanted.values()):
        return []
    name, ((has,), (needs,)) = next(iter(vectors.items()))
    return [f"its layers have other widths, such as {name} {has} and not {needs}"]
