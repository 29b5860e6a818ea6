"""The images of `resnet-flax eval`: the data set, its split, and what a run held out."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from resnet_flax.cli import eval_flags
from resnet_flax.cli.parser import either
from resnet_flax.errors import UserError
from resnet_flax.runtime import storage
from resnet_flax.runtime.terminal import say

if TYPE_CHECKING:
    from resnet_flax.data.sources import Source
    from resnet_flax.weights.loading import Pretrained

# The name of the part of the training images that a run with data.holdout does not train on.
HOLDOUT = "holdout"


class EvalData(NamedTuple):
    """What is evaluated on.

    Attributes:
      name: of the data set.
      split: of it.
      source: its examples, with their own labels.
      about: the split and its number of images, in words.
    """

    name: str
    split: str
    source: "Source"
    about: str


def open_eval_data(arguments: argparse.Namespace, models: "Sequence[Pretrained]") -> EvalData:
    """Opens the split that the flags name, by default that of the run.

    Args:
      arguments: of eval.
      models: the first of them decides what the flags leave open.

    Raises:
      UserError: nothing tells the data set, it has no such split, or the images that the run held
        out cannot be distinguished from the others.
    """
    from resnet_flax.data.sources import open_source, splits_of
    from resnet_flax.data.sources.folder import note_left_out

    first = models[0]
    config = first.config
    own_name = config.get("data.source", "")
    name = own_name if _same(arguments.data, own_name) else arguments.data
    if not name:
        raise UserError(
            f"{arguments.model_name} has no data set of its own; pass --data=tfds:NAME or "
            "--data=folder:DIR"
        )
    options = _options(name, config)
    options["data_dir"] = arguments.data_dir or config.get("data.data_dir", "")
    own = name == own_name
    split = arguments.split or (str(config.get("data.eval_split", "")) if own else "")
    split = split or _usual(name, options, config)
    if split == HOLDOUT:  # of the run, or else a directory of that name
        of_the_run = own and _share(config)
        if of_the_run or HOLDOUT not in splits_of(name, **options):
            return _held_out(arguments, models, name, options)
    # Its classes in its order, as in training: the split alone may lack one.
    classes = first.class_names if own else ()
    source = open_source(name, split, class_names=classes, **options)
    note_left_out(source, split)
    if own and split == config.get("data.eval_split"):
        _note_changes(first, source)
    return EvalData(name, split, source, f"{split} ({len(source):,} images)")


def _same(given: str | None, own: str) -> bool:
    """Whether a data set is that of the run; the directory of a folder may be spelled otherwise."""
    if not given or given == own:
        return True
    (kind, _, where), (own_kind, _, own_where) = (name.partition(":") for name in (given, own))
    folders = kind == own_kind == "folder"
    return folders and storage.local(where).resolve() == storage.local(own_where).resolve()


def _usual(name: str, options: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The first split of a data set that is not the run's whose name is that of a test set."""
    from resnet_flax.data.sources import open_source, splits_of

    splits = splits_of(name, **options)
    for split in eval_flags.SPLITS:
        if split in splits:
            return split
    such = f", such as {HOLDOUT} for what the run held out" * bool(_share(config))
    has = f" (it has {', '.join(splits[:10])})" * bool(splits)
    if splits:
        open_source(name, splits[0], **options)  # says so if there is no split at all
    raise UserError(
        f"{name} has no split {either(eval_flags.SPLITS)}{has}; pass --split=SPLIT{such}"
    )


def _options(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a run has for the keys of its data store, which may be a user's own."""
    if name != config.get("data.source"):
        return {}
    return {key.removeprefix("data."): config[key] for key in config if key.startswith("data.")}


def _share(config: Mapping[str, Any]) -> float:
    return float(config.get("data.holdout", 0.0))


def _held_out(
    arguments: argparse.Namespace,
    models: "Sequence[Pretrained]",
    name: str,
    options: Mapping[str, Any],
) -> EvalData:
    """The images that the run of the first model held out, which no model may be trained on."""
    from resnet_flax.data.experiment import in_order_of
    from resnet_flax.data.sources import hold_out, open_source
    from resnet_flax.data.sources.folder import note_left_out

    first = models[0]
    share = _share(first.config)
    if not share:
        what = "was trained without data.holdout" if first.config else "is not the workdir of a run"
        raise UserError(
            f"{arguments.model_name} {what}, so that --split={HOLDOUT} names no images; give "
            "another --split"
        )
    split = str(first.config["data.train_split"])
    train = in_order_of(open_source(name, split, **options), first.class_names)
    if "train" in first.fingerprints:
        if changes := _changes(first, "train", train):
            raise UserError(
                f"the images that {arguments.model_name} held out can no longer be distinguished "
                f"from those it was trained on, as {name}, {split}, has changed: "
                f"{'; '.join(changes)}; restore the data that the run was trained on, pass --data "
                "with where it is, or another --split"
            )
    else:
        _note(
            f"{arguments.model_name} does not record its images; if {name} has changed since "
            "then, the result may include images that it was trained on"
        )
    _check_ensemble(models, train)
    note_left_out(train, split)
    source = hold_out(train, share)[1]
    about = (
        f"{HOLDOUT} ({len(source):,} of the {len(train):,} images of {split}, which the run held "
        "out)"
    )
    return EvalData(name, HOLDOUT, source, about)


def _check_ensemble(models: "Sequence[Pretrained]", train: "Source") -> None:
    """Raises UserError if a further model was trained on images that the first one held out.

    The draws of two fractions of the same images begin with the same ones.
    """
    first, *others = models
    count = len(train)
    for other in others:
        recorded = "train" in other.fingerprints
        if not recorded:
            _note(f"{other.origin} does not record whether it was trained on these images")
        same = recorded and not _changes(other, "train", train)
        if same and round(count * _share(other.config)) < round(count * _share(first.config)):
            raise UserError(
                f"{other.origin} has data.holdout={_share(other.config):g}, so that it was trained "
                f"on images that {first.origin} held out; give runs with the same data.holdout"
            )


def _note_changes(first: "Pretrained", source: "Source") -> None:
    """Says so if these are not the images of the run's own evaluations."""
    if "eval" in first.fingerprints and (changes := _changes(first, "eval", source)):
        _note(
            "these are not the images of the run's own evaluations, with which the result cannot "
            f"be compared: {'; '.join(changes)}"
        )


def _changes(model: "Pretrained", split: str, now: "Source") -> list[str]:
    """What differs from the images of the model's training or evaluations, 'train' or 'eval'."""
    from resnet_flax.data import fingerprint

    return fingerprint.differences(model.fingerprints[split], fingerprint.take(now), {}, {})


def _note(sentence: str) -> None:
    from resnet_flax.runtime import distributed

    if distributed.is_primary():
        say(f"note: {sentence}", sys.stderr)
