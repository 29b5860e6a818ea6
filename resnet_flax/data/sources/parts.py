"""Parts of other sources, and of examples."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_flax import renamed
from resnet_flax.data.sampler import permutation
from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError


class Share:
    """A subset of another source.

    Args:
      source: the other source.
      indices: of the examples.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self._indices = source, indices
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self._indices[index])]


def whole(source: Source) -> Source:
    """The source itself, or that of which it is a share."""
    while isinstance(source, Share):
        source = source.source
    return source


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """Splits a source in two: a random fraction `share` for validation, and the rest for training.

    The draw depends on the number of examples alone, so that all seeds train on the same ones.
    """
    size = round(len(source) * share)
    if not 0 < size < len(source):
        raise UserError(
            f"data.holdout={share} of {len(source)} training examples is {size}; there must be "
            "some in both parts"
        )
    drawn = permutation(len(source), 0, 2**63)
    return Share(source, np.sort(drawn[size:])), Share(source, np.sort(drawn[:size]))


def example_of(source: Source, index: int) -> Mapping[str, Any]:
    """An example of a source, which may be a user's own, under the current names of its entries.

    Raises:
      UserError: it has no image or label.
    """
    return check_example(source[index])


def check_example(example: Any) -> Mapping[str, Any]:
    """See `example_of`."""
    if isinstance(example, Mapping):
        example = renamed.example(example)
        if {"image", "label"} <= set(example):
            return example  # type: ignore[no-any-return]
        has = f"a dict of {', '.join(map(repr, example)) or 'nothing'}"
    else:
        has = f"a {type(example).__name__}"
    raise UserError(f"examples must be dicts with 'image' and 'label', not {has}")


def label_of(example: Mapping[str, Any], classes: int) -> int:
    """The label of an example.

    Args:
      example: see `example_of`.
      classes: number of classes.

    Raises:
      UserError: it is not the index of a class. Compiled programs would not notice.
    """
    label = np.asarray(example["label"])
    if label.ndim or label.dtype.kind not in "iu" or not 0 <= label < classes:
        raise UserError(
            f"an example has the label {example['label']!r}; labels must be whole numbers from 0 "
            f"to {classes - 1}, indices of class_names"
        )
    return int(label)
