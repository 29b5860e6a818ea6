"""Examples in memory."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from resnet_flax.errors import UserError


class ArraySource:
    """Examples in memory.

    Args:
      images: `[n, h, w, c]` uint8.
      labels: `[n]`, indices into `class_names`.
      class_names: one for each label.

    Raises:
      UserError: the arrays are not of this form.
    """

    def __init__(self, images: Any, labels: Any, class_names: Sequence[str]) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise UserError(
                f"images must be uint8 [n, height, width, channels], from 0 to 255, not "
                f"{images.dtype} of {list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"labels must be {len(images)} whole numbers, one per image, not {labels.dtype} of "
                f"{list(labels.shape)}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise UserError(
                f"labels must be from 0 to {len(class_names) - 1}, one of class_names, not "
                f"{labels.min()} to {labels.max()}"
            )
        self.images, self.labels = images, labels.astype(np.int32)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the examples: digests of all pixels and labels."""
        arrays = {"images": self.images, "labels": self.labels}
        return {
            name: sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
            for name, array in arrays.items()
        }
