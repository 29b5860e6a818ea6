"""Handwritten digits as a TFDS data set: 1,797 scans that scikit-learn ships, no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998, UCI).

    Images are 8x8 with 17 values, 0 to 16 (counts of set pixels in 4x4 blocks of the scan), here
    scaled to 0 to 255. The test split is always the last 360 scans: a random one would share
    writers with the training split and give errors that are too low.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "scikit-learn's 1,797 scans; the last 360 are the test split."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": np.int64,
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=[str(n) for n in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # the data comes with scikit-learn
        return {
            "train": self._generate_examples(slice(None, -TEST_SIZE)),
            "test": self._generate_examples(slice(-TEST_SIZE, None)),
        }

    def _generate_examples(self, rows: slice) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        ids = np.arange(len(digits.target))[rows]
        for i, scan, label in zip(ids, digits.images[rows], digits.target[rows], strict=True):
            pixels = np.round(scan * (255 / 16)).astype(np.uint8)
            # A PIL image: TFDS would encode an array with TensorFlow.
            yield (
                int(i),
                {"id": int(i), "image": Image.fromarray(pixels), "label": int(label)},
            )
