"""What ends training in all processes at once if one of them cannot read its part of a batch."""

from collections.abc import Callable, Iterator
from functools import partial

from resnet_flax.data import parts
from resnet_flax.data.pipeline import Batch


class CommonError(Exception):
    """What ends the training loop in all processes at once, so that they can save together.

    Attributes:
      step: of the state to save.
      error: what to report in this process.
    """

    def __init__(self, step: int, error: Exception) -> None:
        super().__init__(str(error))
        self.step, self.error = step, error


def incomplete(step: int, what: str, error: Exception | None) -> CommonError:
    """The error in every process if some could not read their part.

    Args:
      step: of the state to save.
      what: what that was a part of.
      error: why this process could not; None if it could.
    """
    return CommonError(step, parts.unread(what, error))


def complete_batches(
    batches: Iterator[Batch], number: int, blank: Callable[[int], Batch], what: str, step: int
) -> Iterator[Batch]:
    """This process's parts of a number of batches, see `data.parts.complete_batches`.

    Args:
      batches: the parts that this process reads.
      number: of batches.
      blank: see `data.parts.Parts`.
      what: what the batches are, for the error.
      step: of the state to save if a part cannot be read.

    Raises:
      CommonError: with several processes, one could not read its part; after the last batch.
    """
    return parts.complete_batches(batches, number, blank, partial(incomplete, step, what))
