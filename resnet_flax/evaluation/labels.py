"""Labels of a data set as outputs of a network."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resnet_flax.data import fingerprint
from resnet_flax.data.class_names import composed, numbers, other_orders, positions, same
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.parts import example_of, label_of
from resnet_flax.errors import UserError

# Classes that a message names.
SHOWN = 3
# What settles which class an output is of.
NAMING = "--class_names=FILE with the data's names in the order of the outputs"


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
    source: Source,
    class_names: Sequence[str],
    classes: int,
    *,
    by_number: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Source:
    """A source whose labels are a network's outputs, matched by the names of the classes.

    If that is not asked for or the network's names are unknown, classes are matched by number. The
    number of a class is its name where all names are numbers, otherwise its position; so is that of
    an output.

    Args:
      source: examples.
      class_names: of the network's outputs; empty if unknown.
      classes: number of the outputs.
      by_number: match by number, whatever the names.
      say: gets a sentence on the pairs, if they are matched by number.

    Returns:
      The source itself if its labels are the outputs.

    Raises:
      UserError: the network has no head or lacks a class of the source, or a class would be matched
        with an output other than that of its name.
    """
    check_head(classes)
    theirs = source.class_names
    if class_names and not by_number:
        outputs = _by_name(theirs, class_names)
    else:
        outputs = _by_number(theirs, class_names, classes, subset=by_number)
        say(_pairs(theirs, class_names, outputs))
    if outputs == list(range(classes)):
        return source
    named = list(class_names or map(str, range(classes)))
    if not class_names:
        for name, output in zip(theirs, outputs, strict=True):
            named[output] = name
    return Relabelled(source, np.array(outputs), tuple(named))


def _by_name(theirs: Sequence[str], names: Sequence[str]) -> list[int]:
    """The output of each of the data's classes."""
    if same(theirs, names):
        return list(range(len(names)))
    found = positions(theirs, names)
    strange = [name for name, output in zip(theirs, found, strict=True) if output is None]
    if strange:
        remedies = f"or pass {NAMING}"
        with contextlib.suppress(UserError):
            _by_number(theirs, names, len(names), subset=True)
            remedies = f"pass --by_number if its numbers are those of the outputs, {remedies}"
        raise UserError(
            f"{len(strange)} of the data's {len(theirs)} classes are not among the network's "
            f"{len(names)} ({_some(strange)}; the network's: {_some(names)}); give data with the "
            f"network's classes, {remedies}"
        )
    outputs = [output for output in found if output is not None]
    twice = [name for name, count in Counter(map(composed, names)).items() if count > 1]
    twice = [name for name in twice if None not in positions([name], theirs)]
    if twice:
        raise UserError(
            f"the network has several outputs of the name {twice[0]}, so the data's class of this "
            f"name has no single one; pass {NAMING}, each different"
        )
    return outputs


def _by_number(
    theirs: Sequence[str], names: Sequence[str], classes: int, *, subset: bool
) -> list[int]:
    """The output of each of the data's classes; `subset` allows that numbered ones are few."""
    number = numbers(theirs)
    if len(theirs) != classes and not (number and subset):
        raise UserError(
            f"the data has {len(theirs)} classes, the network {classes} outputs"
            f"{' of unknown names' if not names else ''}; give data with as many classes"
            + ", or pass --by_number if their names are the numbers of outputs"
            * bool(number)
        )
    output_of = {number: i for i, number in enumerate(numbers(names) or range(classes))}
    missing = [one for one in number or () if one not in output_of]
    if missing:
        raise UserError(
            f"class {missing[0]} of the data has no output, as the network's {classes} outputs are "
            f"numbered {min(output_of)} to {max(output_of)}; rename the data's classes, or "
            f"pass {NAMING}"
        )
    outputs = [output_of[one] for one in number or sorted(output_of)]
    for name, output, own in zip(theirs, outputs, positions(theirs, names), strict=True):
        if own is not None and not same([name], [names[output]]):
            raise UserError(
                f"by number, class {name} of the data would be output {output} ({names[output]}), "
                f"but {name} is the name of output {own}; leave --by_number out, or pass "
                f"{NAMING}"
            )
    return outputs


def _pairs(theirs: Sequence[str], names: Sequence[str], outputs: Sequence[int]) -> str:
    """Which classes and outputs are compared, and whether another program may mean others."""
    pairs = [
        f"{name} is output {output}{f' ({names[output]})' if names else ''}"
        for name, output in zip(theirs, outputs, strict=True)
    ]
    more = f" and {len(pairs) - SHOWN} more" * (len(pairs) > SHOWN)
    sentence = f"classes are matched by number: {', '.join(pairs[:SHOWN])}{more}"
    if names or outputs != list(range(len(theirs))):
        return sentence
    for how, order in other_orders(theirs).items():
        output = next(i for i, (a, b) in enumerate(zip(theirs, order, strict=True)) if a != b)
        sentence += f"; sorted {how}, output {output} is {order[output]}, not {theirs[output]}"
    return f"{sentence}; if the outputs are in another order, pass {NAMING}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def check_head(num_classes: int) -> None:
    """Raises UserError if a network has no head, so that it predicts no classes."""
    if num_classes == 0:
        raise UserError(
            "a network without a head (num_classes=0) predicts no classes and cannot be evaluated; "
            "give one with a head"
        )
