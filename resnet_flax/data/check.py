"""Checks of a data set before training starts."""

from collections.abc import Callable
from typing import Any

import numpy as np

from resnet_flax.data.pipeline import Ignored, Shapes, different_sizes, shapes_of
from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.parts import example_of, label_of
from resnet_flax.errors import UserError

# Splits of up to SMALL examples are checked completely, larger ones on evenly spaced samples.
SMALL, SAMPLE = 1000, 256


class _Shapes:
    """The shapes of a split's transformed examples."""

    def __init__(
        self,
        source: Source,
        transform: Any,
        split: str,
        indices: np.ndarray,
        ignored: Ignored | None,
    ) -> None:
        self._source, self._transform = source, transform
        self._split, self._indices, self._ignored = split, indices, ignored

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = example_of(self._source, int(self._indices[index]))
            label_of(example, len(self._source.class_names))
            found: dict[str, Any] = {
                "shapes": shapes_of(example, self._transform(example["image"]))
            }
            if self._ignored is not None:
                found["ignored"] = self._ignored.pixels.ignored(example["image"])
            return found
        except UserError as error:
            raise UserError(f"in the split {self._split!r}, {error}") from error


def check_examples(
    source: Source,
    transform: Callable[[Any], np.ndarray],
    split: str,
    patience: Patience = PATIENT,
    ignored: Ignored | None = None,
) -> Shapes:
    """Reads examples as an evaluation does, so that errors appear now and not hours later.

    Args:
      source: the split.
      transform: makes them of one size, see `transforms.EvalTransform`.
      split: its name.
      patience: see `readers.reading`.
      ignored: counts the examples, of those looked at, of which something is ignored.

    Returns:
      The shapes of a transformed example.

    Raises:
      UserError: there are no examples, one cannot be read or decoded, or they differ in size.
    """
    number = len(source)
    if not number:
        raise UserError(f"the split {split!r} has no examples; give another split, or add some")
    count = number if number <= SMALL else SAMPLE
    indices = np.unique(np.linspace(0, number - 1, count).round().astype(int))
    with reading(_Shapes(source, transform, split, indices, ignored), 0, patience) as found:
        looked_at = list(found if ignored is None else ignored.counted(found))
    shapes = [one["shapes"] for one in looked_at]
    first = shapes[0]["image"]
    for index, other in zip(indices, shapes, strict=True):
        if other["image"] != first:
            raise different_sizes(
                f"in the split {split!r}, example {indices[0]} has shape {list(first)} (height, "
                f"width, channels) and example {index} {list(other['image'])}"
            )
    return shapes[0]
