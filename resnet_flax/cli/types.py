"""Types of arguments: functions for argparse's `type=`.

Each parses a string or raises ArgumentTypeError, whose message continues the name of the argument:
'--seeds' + ' must be a whole number from 1 to 1000, not 'x''.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from resnet_flax.data import class_names
from resnet_flax.data.sources import SOURCES
from resnet_flax.errors import UserError
from resnet_flax.runtime import storage

# The highest number that a 32-bit integer holds.
INT32 = 2**31 - 1


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """A type for whole numbers in a range, both ends included."""

    def parse(text: str) -> int:
        value = _int(text)
        if value is None or not lowest <= value <= highest:
            raise ArgumentTypeError(
                f"must be a whole number from {lowest} to {highest}, not {text!r}"
            )
        return value

    return parse


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """A type for numbers in a range, both ends included."""

    def parse(text: str) -> float:
        value = _float(text)
        if value is None or not lowest <= value <= highest:
            raise ArgumentTypeError(
                f"must be a number from {lowest:.10g} to {highest:.10g}, not {text!r}"
            )
        return value

    return parse


def whole_numbers(lowest: int, highest: int, example: str) -> Callable[[str], list[int]]:
    """A type for comma-separated whole numbers in a range, such as `example`."""

    def parse(text: str) -> list[int]:
        values = [_int(part) for part in text.split(",")]
        found = [value for value in values if value is not None and lowest <= value <= highest]
        if len(found) < len(values):
            raise ArgumentTypeError(
                f"must be whole numbers from {lowest} to {highest} separated by commas, such "
                f"as {example}, not {text!r}"
            )
        return found

    return parse


def channel_numbers(example: str, *, zero: bool = True) -> Callable[[str], tuple[float, ...]]:
    """A type for one finite number, or one for each channel, such as `example`.

    Args:
      example: shown in errors, with one number for each channel.
      zero: 0 is allowed.
    """

    def parse(text: str) -> tuple[float, ...]:
        values = [_float(part) for part in text.split(",")]
        found = tuple(value for value in values if value is not None and (zero or value))
        if len(found) < len(values):
            other = "" if zero else " other than 0"
            raise ArgumentTypeError(
                f"must be one number{other}, or one for each channel separated by commas, "
                f"such as {example}, not {text!r}"
            )
        return found

    return parse


def output_file(ending: str = "") -> Callable[[str], Path]:
    """A type for an output file, which fails early if the file cannot be written.

    Missing directories are made when the file is written; this check leaves nothing behind.

    Args:
      ending: required suffix of the name, such as '.png'; empty allows any.
    """

    def parse(text: str) -> Path:
        path = _local(text)
        if not path.name.lower().endswith(ending):
            raise ArgumentTypeError(f"must be a file that ends in {ending}, not {text!r}")
        try:
            storage.probe_file(path)
        except OSError as error:
            raise ArgumentTypeError(
                f"must be a file that can be written, not {text!r}: {error.strerror}"
            ) from error
        return path

    return parse


def directory(text: str) -> str:
    """A type for a directory on this machine; empty for none."""
    return str(_local(text)) if text else ""


def names_file(text: str) -> tuple[str, ...]:
    """A type for a text file with names of classes, one a line; the names."""
    path = _local(text)
    try:
        return class_names.read(path)
    except UserError as error:
        raise ArgumentTypeError(f"must be a text file with one name a line: {error}") from error


def _local(text: str) -> Path:
    try:
        return storage.local(text)
    except UserError as error:
        raise ArgumentTypeError(f"must be a path: {error}") from error


def model(text: str) -> str:
    """A type for a network with weights; refuses what is often given in its place."""
    kind, _, name = text.partition(":")
    if kind in SOURCES and name:
        raise ArgumentTypeError(f"must be a network with weights, not the data set {text!r}")
    if text.partition(":")[0].endswith(".py"):
        raise ArgumentTypeError(
            f"must be a network with weights, such as the workdir of a run, not a config, {text!r}"
        )
    return text


def data_source(text: str) -> str:
    """A type for the name of a data set."""
    kind, _, name = text.partition(":")
    if kind not in SOURCES or not name:
        is_directory = text and not name and storage.is_directory(Path(text))
        folder = f"; did you mean folder:{text}?" if is_directory else ""
        raise ArgumentTypeError(
            f"must be tfds:NAME or folder:DIR, such as tfds:cifar10, not {text!r}{folder}"
        )
    return text


def tfds_source(text: str) -> str:
    """A type for the name of a data set of TFDS."""
    kind, _, name = text.partition(":")
    if kind != "tfds" or not name:
        raise ArgumentTypeError(f"must be tfds:NAME, such as tfds:cifar10, not {text!r}")
    return text


def _int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _float(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
