"""The mean training image."""

from collections.abc import Callable
from typing import Any

import numpy as np

from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source

# Larger sets are sampled at so many evenly spaced examples: the mean's noise is then about 1.
SAMPLE = 4096


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
    sample: int,
    patience: Patience = PATIENT,
) -> np.ndarray:
    """The mean training image, `[h, w, c]` float32 from 0 to 255.

    Args:
      source: the training images.
      transform: makes them of one size, see `transforms.EvalTransform`.
      sample: number of evenly spaced examples to use if there are more.
      patience: see `readers.reading`.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int)
    with reading(_Pixels(source, transform, indices), 0, patience) as images:
        total = sum(images)
    # Rounded as in checkpoints.
    return (total / len(indices)).round(2).astype(np.float32)
