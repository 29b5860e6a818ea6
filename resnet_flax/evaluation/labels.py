"""Labels of a data set as outputs of a network."""

from typing import Any

import numpy as np

from resnet_flax.data import fingerprint
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.parts import example_of, label_of
from resnet_flax.errors import UserError


class Relabelled:
    """A source whose labels are the outputs of a network.

    Args:
      source: with its own labels.
      outputs: the network's output for each of the source's classes.
      class_names: of the outputs.
    """

    def __init__(self, source: Source, outputs: np.ndarray, class_names: tuple[str, ...]) -> None:
        self._source, self._outputs, self.class_names = source, outputs, class_names
        self.labelled = getattr(source, "labelled", len(source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = example_of(self._source, index)
        label = label_of(example, len(self._source.class_names))  # -1 would be the last class
        found = {**example, "label": np.int32(self._outputs[label])}
        if "valid_labels" in example:
            found["valid_labels"] = np.zeros(len(self.class_names), bool)
            found["valid_labels"][self._outputs[example["valid_labels"]]] = True
        return found

    def fingerprint(self) -> dict[str, Any]:
        """That of the source, see `fingerprint.take`."""
        return fingerprint.take(self._source)


def as_outputs(
    source: Source, class_names: tuple[str, ...], classes: int, *, by_number: bool = False
) -> Source:
    """A source whose labels are a network's outputs, matched by the names of the classes.

    Args:
      source: examples.
      class_names: of the network's outputs; empty if unknown.
      classes: number of the outputs.
      by_number: use labels as outputs, whatever the names.

    Returns:
      The source itself if the names are unknown or the same.

    Raises:
      UserError: the network has no head, or lacks a class of the source.
    """
    check_head(classes)
    theirs = source.class_names
    if not class_names or by_number:
        if len(theirs) != classes:
            raise UserError(
                f"the data has {len(theirs)} classes, the network {classes} outputs"
                f"{' of unknown names' if not class_names else ''}; give data with as many classes"
            )
        return source
    if theirs == class_names:
        return source
    number = {name: output for output, name in enumerate(class_names)}
    strange = [name for name in theirs if name not in number]
    if strange:
        raise UserError(
            f"{len(strange)} of the data's {len(theirs)} classes are not among the network's "
            f"{len(class_names)} ({', '.join(strange[:3])}, ...; the network's: "
            f"{', '.join(class_names[:3])}, ...); give data with its classes, or pass --by_number "
            "if they are the same in the same order"
        )
    return Relabelled(source, np.array([number[name] for name in theirs]), class_names)


def check_head(num_classes: int) -> None:
    """Raises UserError if a network has no head, so that it predicts no classes."""
    if num_classes == 0:
        raise UserError(
            "a network without a head (num_classes=0) predicts no classes and cannot be evaluated; "
            "give one with a head"
        )
