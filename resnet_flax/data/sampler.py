"""The order of training examples: a pure function of the seed."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Defines the example at each position of the endless stream of training examples.

    The stream is a sequence of permutations of all examples, each from the seed and the
    permutation's number. With `repeats`, each example occurs that many times in a row (Hoffer et
    al. 2020), so the same number of positions has fewer examples.

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

    It sorts Philox's raw output: both are fixed by definition, whereas the shuffles of libraries
    may change between versions.
    """
    return np.argsort(np.random.Philox(key=[seed, number]).random_raw(size), kind="stable")
