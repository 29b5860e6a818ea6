"""The mean training image."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source

# Sets of more pixels than `WHOLE`, as bytes, are sampled at so many evenly spaced examples: the
# mean's noise is then about 1. This depends on the images alone, so that a run with the same ones
# has the same mean, however it reads them.
SAMPLE = 4096
WHOLE = 2**30


class _Pixels:
    """Some of a source's transformed images, in a type in which they can be added up."""

    def __init__(self, source: Source, transform: Any, indices: np.ndarray) -> None:
        self._source, self._transform, self._indices = source, transform, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self._source[int(self._indices[index])]["image"]
        return self._transform(image).astype(np.int64)


def pixel_mean(
    source: Source,
    transform: Callable[[Any], np.ndarray],
    shape: tuple[int, ...],
    patience: Patience = PATIENT,
) -> np.ndarray:
    """The mean training image, `[h, w, c]` float32 from 0 to 255.

    Args:
      source: the training images.
      transform: makes them of one size, see `transforms.EvalTransform`.
      shape: of a transformed image.
      patience: see `readers.reading`.
    """
    whole = len(source) * math.prod(shape) <= WHOLE
    number = len(source) if whole else min(SAMPLE, len(source))
    indices = np.linspace(0, len(source) - 1, number).round().astype(int)
    with reading(_Pixels(source, transform, indices), 0, patience) as images:
        total = sum(images)
    # Rounded as in checkpoints.
    return (total / len(indices)).round(2).astype(np.float32)
