"""This process's parts of global batches, and what happens if one of them cannot be read.

With several processes each reads its own part, and all of them must take every step: one that
stopped alone would leave the others waiting for it in a collective.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import jax

from resnet_flax.data.pipeline import Batch, different_sizes
from resnet_flax.errors import UserError
from resnet_flax.runtime import distributed


class Parts:
    """An iterator over parts of batches; after one that cannot be read, over blank ones.

    Args:
      batches: the parts that this process reads.
      blank: what takes the place of one, by the number of its batch; no example in it counts.
      first: number of the first batch.

    Attributes:
      error: why a part could not be read; None if all could.
    """

    def __init__(
        self, batches: Iterator[Batch], blank: Callable[[int], Batch], first: int = 0
    ) -> None:
        self._batches, self._blank, self._number = batches, blank, first
        self.error: Exception | None = None

    def __iter__(self) -> "Parts":
        return self

    def __next__(self) -> Batch:
        blank = self._blank(self._number)
        self._number += 1
        if self.error is None:
            try:
                return _of_shape(next(self._batches), blank["image"].shape)
            except Exception as error:
                self.error = error
        return blank


def _of_shape(batch: Batch, expected: tuple[int, ...]) -> Batch:
    """The batch; raises UserError if the parts of other processes cannot have its shape."""
    found = batch["image"].shape
    if found != expected:
        raise different_sizes(
            f"the images have shape {list(found[1:])} (height, width, channels), others "
            f"{list(expected[1:])}"
        )
    return batch


def complete_batches(
    batches: Iterator[Batch],
    number: int,
    blank: Callable[[int], Batch],
    incomplete: Callable[[Exception | None], Exception],
) -> Iterator[Batch]:
    """This process's parts of a number of batches, all of which count or none.

    Args:
      batches: the parts that this process reads.
      number: of batches.
      blank: see `Parts`.
      incomplete: what to raise if a part cannot be read, from why that failed in this process, or
        from None if it failed in another one, such as by `unread`.

    Raises:
      Exception: with several processes, one could not read its part; after the last batch.
    """
    if jax.process_count() == 1:
        yield from islice(batches, number)
        return
    parts = Parts(batches, blank)
    yield from islice(parts, number)
    if distributed.all_max(int(parts.error is not None)):
        raise incomplete(parts.error)


def unread(what: str, error: Exception | None) -> Exception:
    """The error in every process if some could not read their part.

    Args:
      what: what that was a part of.
      error: why this process could not; None if it could.
    """
    return error or UserError(f"another process could not read its part of {what}; see its error")
