"""What is computed from the training images before training."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from resnet_flax.data.sources import Source

# Of larger sets, this many examples at even distances: the mean's noise is then a grey level.
SAMPLE = 4096


def pixel_mean(source: Source, transform: Callable[[Any], np.ndarray], sample: int) -> np.ndarray:
    """The mean training image, `[h, w, c]` float32 in grey levels.

    Args:
      source: the training images.
      transform: makes them of one size, see `transforms.EvalTransform`.
      sample: number of examples to take at even distances where there are more.
    """
    indices = np.linspace(0, len(source) - 1, min(sample, len(source))).round().astype(int)

    def pixels(index: int) -> np.ndarray:
        return transform(source[index]["image"]).astype(np.int64)

    with ThreadPoolExecutor() as pool:
        first, *rest = map(int, indices)
        total = pixels(first)
        for image in pool.map(pixels, rest):
            total += image
    # Rounded as checkpoints write it down.
    return (total / len(indices)).round(2).astype(np.float32)
