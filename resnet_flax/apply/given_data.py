"""Data that is given to a function rather than named in a config: arrays, sources, directories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from resnet_flax.data.class_names import same
from resnet_flax.data.experiment import in_order_of, open_split
from resnet_flax.data.experiment import open_splits as configured_splits
from resnet_flax.data.sources import GIVEN, Source, check_source, hold_out, splits_of
from resnet_flax.data.sources.arrays import ArraySource
from resnet_flax.errors import UserError


def with_source(config: ml_collections.ConfigDict, data: Any) -> ml_collections.ConfigDict:
    """The config with `data.source` set to the name of `data`, if it has one.

    A directory that has no split 'test', the default of `data.eval_split`, is evaluated on 'val'.
    """
    config = config.copy_and_resolve_references()
    name = name_of(data)
    with config.unlocked():
        if not name:
            return config
        if "data" not in config:
            config.data = ml_collections.ConfigDict()
        config.data.source = name
        default = name.startswith("folder:") and config.data.get("eval_split", "test") == "test"
        if default and {"val", "test"}.intersection(splits_of(name)) == {"val"}:
            config.data.eval_split = "val"
    return config


def open_splits(
    data: ml_collections.ConfigDict,
    given: Any = None,
    eval_data: Any = None,
    class_names: Sequence[str] = (),
) -> tuple[Source, Source]:
    """The splits for training and evaluation.

    Args:
      data: the config's.
      given: for training, see `as_source`; by default the config's. If it has a name, that is
        `data.source`.
      eval_data: for evaluation; by default another split of the same data.
      class_names: of a run that may continue. A folder with the same classes gets their order,
        which was another one in former versions if their names are numbers.

    Raises:
      UserError: there are no data for the evaluation, or they have other classes.
    """
    if eval_data is None and (given is None or name_of(given)):
        return configured_splits(data, class_names)
    train = as_source(data.source if given is None else given, data.train_split, data)
    train = in_order_of(train, class_names)
    held_out = None
    if data.holdout:
        train, held_out = hold_out(train, data.holdout)
    if eval_data is not None:
        evaluated = as_source(eval_data, data.eval_split, data)
        return train, _same_classes(train, in_order_of(evaluated, train.class_names))
    if data.eval_split != "holdout" or held_out is None:
        raise UserError(
            "there are no images for the evaluation; give eval_data=, or evaluate on a part of the "
            "training images by config.data.holdout = 0.1 and config.data.eval_split = 'holdout'"
        )
    return train, held_out


def without_source(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A checked config whose `data.source` says that its data was given without a name."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.source = GIVEN
    return config


def as_source(given: Any, split: str, data: ml_collections.ConfigDict) -> Source:
    """Data as a source of examples.

    Args:
      given: a `Source`; a pair of arrays, images `[n, h, w, c]` uint8 and labels `[n]`; the name of
        a data set, such as 'tfds:cifar10'; or a directory with images in SPLIT/CLASS.
      split: of a data set or directory.
      data: the config's, for how to open a data set.
    """
    name = name_of(given)
    if name:
        return open_split(data, name, split)
    if isinstance(given, tuple | list) and len(given) == 2:
        images, labels = map(np.asarray, given)
        # `ArraySource` refuses others. Unsigned ones, as CIFAR's, have no -1 for no labels.
        most = int(labels.max()) if labels.size and labels.dtype.kind in "iu" else -1
        names = tuple(map(str, range(most + 1)))
        return check_source(ArraySource(images, labels, names), "data")
    if isinstance(given, Source):
        return check_source(given, "data")
    raise UserError(
        "data must be a directory, the name of a data set such as 'tfds:cifar10', a pair of arrays "
        f"(images, labels), or a resnet_flax.data.ArraySource, not {type(given).__name__}"
    )


def name_of(data: Any) -> str:
    """`data.source` for data that has a name; empty for others."""
    if isinstance(data, Path) or (isinstance(data, str) and ":" not in data):
        return f"folder:{data}"
    return data if isinstance(data, str) else ""


def _same_classes(train: Source, other: Source) -> Source:
    """The evaluation's source, whose labels must mean what the training's do."""
    arrays = isinstance(other, ArraySource) and len(other.class_names) <= len(train.class_names)
    if arrays and same(other.class_names, train.class_names[: len(other.class_names)]):
        return ArraySource(other.images, other.labels, train.class_names)  # type: ignore[attr-defined]
    if not same(other.class_names, train.class_names):
        raise UserError(
            f"the evaluation has {_listed(other.class_names)}, the training "
            f"{_listed(train.class_names)}; give data with the same classes"
        )
    return other


def _listed(names: Sequence[str]) -> str:
    """Such as '2 classes (cat, dog)'."""
    several = "es" * (len(names) > 1)
    return f"{len(names)} class{several} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})"
