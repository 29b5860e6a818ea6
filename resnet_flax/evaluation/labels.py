"""Labels of a data set as outputs of a network."""

from typing import Any

import numpy as np

from resnet_flax import renamed
from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError


class Relabelled:
    """A source whose labels are the outputs of a network.

    Args:
      source: with labels of its own.
      outputs: of each of its classes, the network's output.
      class_names: of the outputs.
    """

    def __init__(self, source: Source, outputs: np.ndarray, class_names: tuple[str, ...]) -> None:
        self._source, self._outputs, self.class_names = source, outputs, class_names
        self.labelled = getattr(source, "labelled", len(source))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = renamed.example(self._source[index])
        found = {**example, "label": np.int32(self._outputs[example["label"]])}
        if "valid_labels" in example:
            found["valid_labels"] = np.zeros(len(self.class_names), bool)
            found["valid_labels"][self._outputs[example["valid_labels"]]] = True
        return found


def as_outputs(
    source: Source, class_names: tuple[str, ...], classes: int, *, by_number: bool = False
) -> Source:
    """A source with labels that are a network's outputs, found by the names of the classes.

    Args:
      source: examples.
      class_names: of the network's outputs; empty where they are not known.
      classes: number of the outputs.
      by_number: take labels as outputs, whatever the names.

    Returns:
      The source itself where nothing is known or the names are the same.

    Raises:
      UserError: some class of the source is none of the network's.
    """
    theirs = source.class_names
    if not class_names or by_number:
        if len(theirs) != classes:
            raise UserError(
                f"the data has {len(theirs)} classes, the network {classes} outputs"
                f"{' of unknown names' if not class_names else ''}; give data of as many classes"
            )
        return source
    if theirs == class_names:
        return source
    number = {name: output for output, name in enumerate(class_names)}
    strange = [name for name in theirs if name not in number]
    if strange:
        raise UserError(
            f"{len(strange)} of the data's {len(theirs)} classes are none of the network's "
            f"{len(class_names)} ({', '.join(strange[:3])}, ...; the network's: "
            f"{', '.join(class_names[:3])}, ...); give data of its classes, or say --by_number "
            "where they are the same in the same order"
        )
    return Relabelled(source, np.array([number[name] for name in theirs]), class_names)
