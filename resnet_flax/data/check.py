"""What is found out about a data set before it is needed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError

# Splits of so many examples are looked at whole; of larger ones a sample, at even distances.
SMALL, SAMPLE = 1000, 256


def check_examples(source: Source, transform: Callable[[Any], np.ndarray], split: str) -> None:
    """Reads examples as an evaluation would, so that it does not fail hours later.

    Args:
      source: the split.
      transform: makes them of one size, see `transforms.EvalTransform`.
      split: what to call it.

    Raises:
      UserError: there is no example, one cannot be read or decoded, or they differ in size.
    """
    number = len(source)
    if not number:
        raise UserError(f"the split {split!r} has no example; give another, or add some")
    count = number if number <= SMALL else SAMPLE
    indices = np.unique(np.linspace(0, number - 1, count).round().astype(int))

    def shape(index: int) -> tuple[int, ...]:
        try:
            return transform(source[index]["image"]).shape
        except UserError as error:
            raise UserError(f"in the split {split!r}, {error}") from error

    with ThreadPoolExecutor() as pool:
        shapes = list(pool.map(shape, map(int, indices)))
    for index, other in zip(indices, shapes, strict=True):
        if other != shapes[0]:
            raise UserError(
                f"in the split {split!r}, example {indices[0]} is of {list(shapes[0])} (height, "
                f"width, channels) and example {index} of {list(other)}; set data.size, with "
                "data.crop for training, to make them of one size"
            )
