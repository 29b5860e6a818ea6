"""The order of training examples: a pure function of the seed."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Which example stands at each position of the endless stream of training examples.

    The stream is one permutation of all examples after another, each from the seed and its
    number. With `repeats` each example of it stands that many times in a row (Hoffer et al.
    2020), and the same number of positions reads fewer examples.

    Attributes:
      size: number of examples.
      seed: of the permutations.
      repeats: of each example.
    """

    size: int
    seed: int
    repeats: int = 1

    def examples(self, first: int, count: int) -> np.ndarray:
        """Indices of the examples at the positions `first` to `first + count - 1`, int64."""
        drawn = np.arange(first, first + count) // self.repeats
        epochs, within = np.divmod(drawn, self.size)
        found = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = permutation(self.size, self.seed, int(epoch))[within[chosen]]
        return found


@functools.lru_cache(maxsize=3)
def permutation(size: int, seed: int, number: int) -> np.ndarray:
    """A permutation of `range(size)`, the `number`-th of the seed, int64.

    The order of Philox's raw output: both are fixed by their definitions, where the shuffles of
    libraries may change with a version.
    """
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(size), kind="stable")
