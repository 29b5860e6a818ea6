"""A source's images, decoded once and kept."""

import itertools
from typing import Any

import numpy as np

from resnet_flax.data.pixels import DEFAULT, Pixels, to_array
from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.arrays import ArraySource
from resnet_flax.data.sources.parts import check_example, label_of
from resnet_flax.errors import UserError


class _Chunks:
    """A source's examples in chunks of hundreds, which are faster to pass between threads."""

    size = 256

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return -(-len(self._source) // self.size)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        first = index * self.size
        return [self._source[i] for i in range(first, min(first + self.size, len(self._source)))]


def in_memory(
    source: Source, patience: Patience = PATIENT, pixels: Pixels = DEFAULT
) -> ArraySource:
    """All of a source's images, decoded once.

    Args:
      source: examples.
      patience: see `readers.reading`.
      pixels: what is kept of each image.

    Raises:
      UserError: they differ in size.
    """
    images: np.ndarray | None = None
    labels, classes = np.zeros(len(source), np.int32), len(source.class_names)
    with reading(_Chunks(source), 0, patience) as chunks:
        for i, example in enumerate(itertools.chain.from_iterable(chunks)):
            example = check_example(example)
            image, labels[i] = to_array(pixels(example["image"])), label_of(example, classes)
            if images is None:
                images = np.empty((len(source), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"only images of the same size can be kept in memory, but number 0 has shape "
                    f"{images.shape[1:]} and number {i} {image.shape}; set data.in_memory and "
                    "data.resident to False"
                )
            images[i] = image
    return ArraySource(images, labels, source.class_names)
