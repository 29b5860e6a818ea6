"""Where examples come from: random access to `{image, label}`, with class names."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from resnet_flax.data.order import permutation
from resnet_flax.data.transforms import load, to_array
from resnet_flax.errors import UserError, closest, first_line

# Data sets that this package can prepare by itself, from other packages' data.
EMBEDDED = ("digits",)

# Sets of which an example has several right labels, or none: the features that hold one label and
# all of them, and how many examples of a split have any (Beyer et al. 2020, "Are we done with
# ImageNet?": 46,837 of 50,000).
SEVERAL_LABELS: dict[str, tuple[str, str, dict[str, int]]] = {
    "imagenet2012_real": ("original_label", "real_label", {"validation": 46_837}),
}

# What counts as an image in a folder.
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@runtime_checkable
class Source(Protocol):
    """A data set split: any number of examples, by index.

    An example is `image`, a Pillow image or an array `[h, w, c]` uint8, and `label`, an index
    into `class_names`; of a set with several right labels also `accepted`, `[classes]` bool.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TfdsSource:
    """A split of a prepared TFDS image-classification set, read without TensorFlow."""

    def __init__(
        self,
        name: str,
        split: Any,
        class_names: tuple[str, ...],
        channels: int,
        labels: tuple[str, str] = ("label", ""),
        labelled: int | None = None,
    ) -> None:
        self._name, self._split, self._channels = name, split, channels
        self._label, self._accepted = labels
        self.class_names, self.labelled = class_names, labelled

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example = self._split[int(index)]
        except Exception as error:  # the stores and decoders raise all kinds
            raise UserError(
                f"example {index} of {self._name} cannot be read ({first_line(error)}); "
                "prepare the set anew"
            ) from error
        name = f"example {index} of {self._name}"
        image = load(io.BytesIO(example["image"]), name, self._channels)
        found: dict[str, Any] = {"image": image, "label": np.int32(example[self._label])}
        if not 0 <= found["label"] < len(self.class_names):
            raise UserError(
                f"{name} has the label {found['label']}, which is none of the "
                f"{len(self.class_names)} classes; choose a split that is labelled"
            )
        if self._accepted:
            found["accepted"] = np.zeros(len(self.class_names), bool)
            found["accepted"][np.asarray(example[self._accepted], int)] = True
        return found


class FolderSource:
    """Images in a directory that has one of them for each class, in RGB.

    Args:
      directory: of the split, such as /data/imagenet/train.
      class_names: the names of its directories; a directory that is none of them is an error.
    """

    def __init__(self, directory: Path, class_names: tuple[str, ...]) -> None:
        self._directory, self.class_names = directory, class_names
        self._files: list[str] = []
        labels: list[int] = []
        known = {name: label for label, name in enumerate(class_names)}
        for name in _directories(directory):
            if name not in known:
                raise UserError(
                    f"{directory / name} is a class that the training images lack"
                    f"{closest(name, known)}; remove it, or add it there"
                )
            files = list(_images(directory / name))
            if not files:
                raise UserError(
                    f"{directory / name} holds no image ({', '.join(IMAGES)}); add some, or "
                    "remove it"
                )
            self._files += [f"{name}/{file}" for file in files]
            labels += [known[name]] * len(files)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._directory / self._files[index]
        return {"image": load(path, str(path), 3), "label": self._labels[index]}


class ArraySource:
    """Examples held in memory.

    Args:
      images: `[n, h, w, c]` uint8.
      labels: `[n]`, indices into `class_names`.
      class_names: one for each label.

    Raises:
      UserError: the arrays are not so.
    """

    def __init__(self, images: Any, labels: Any, class_names: Sequence[str]) -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise UserError(
                f"images must be uint8 of [n, height, width, channels], not {images.dtype} of "
                f"{list(images.shape)}"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"labels must be {len(images)} whole numbers, one an image, not {labels.dtype} of "
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


class Share:
    """Some examples of another source.

    Args:
      source: that has them.
      indices: theirs.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
    """A source in two: what stays for training, and a `share` of it drawn for validation.

    Which examples are drawn depends on their number alone, so that all seeds train on the same.
    """
    size = round(len(source) * share)
    if not 0 < size < len(source):
        raise UserError(
            f"data.holdout={share} of {len(source)} training examples is {size}; it must leave "
            "some on either side"
        )
    drawn = permutation(len(source), 0, 2**63)
    return Share(source, np.sort(drawn[size:])), Share(source, np.sort(drawn[:size]))


def in_memory(source: Source) -> ArraySource:
    """All of a source's images, decoded once.

    Raises:
      UserError: they are not of one size.
    """
    images: np.ndarray | None = None
    labels = np.zeros(len(source), np.int32)
    for i in range(len(source)):
        example = source[i]
        image, labels[i] = to_array(example["image"]), example["label"]
        if images is None:
            images = np.empty((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"only images of one size can be kept in memory, but number 0 is of "
                f"{images.shape[1:]} and number {i} of {image.shape}; set data.in_memory and "
                "data.resident to False"
            )
        images[i] = image
    return ArraySource(images, labels, source.class_names)


def open_source(
    name: str, split: str, data_dir: str = "", class_names: tuple[str, ...] = ()
) -> Source:
    """The split of the data set that a config's `data.source` names.

    A set in `EMBEDDED` is prepared first where it is not yet.

    Args:
      name: 'tfds:NAME' for a set of TFDS; or 'folder:DIR' for images in DIR/train/CLASS and
        DIR/val/CLASS.
      split: a TFDS split, slices included, such as 'train[:90%]'; of a folder, the name of a
        directory in it.
      data_dir: of TFDS; empty for its default (~/tensorflow_datasets or TFDS_DATA_DIR).
      class_names: of a folder; by default those of DIR/train, or of the split itself where there
        is none, in alphabetical order.

    Raises:
      UserError: there is no such set or split, it is not prepared, or has no images and labels.
    """
    kind, _, where = name.partition(":")
    if kind == "tfds" and where:
        return _open_tfds(name, where, split, data_dir)
    if kind == "folder" and where:
        return _open_folder(Path(where).expanduser(), split, class_names)
    raise UserError(
        f"data.source must be tfds:NAME or folder:DIR, such as tfds:digits, not {name!r}"
    )


def _open_folder(directory: Path, split: str, names: tuple[str, ...]) -> Source:
    splits = _directories(directory)
    if split not in splits:
        raise UserError(
            f"{directory} has no directory {split!r} for that split{closest(split, splits)} "
            f"(it has {', '.join(splits[:10]) or 'none'})"
        )
    classes = directory / ("train" if "train" in splits else split)
    names = names or tuple(_directories(classes))
    if not names:
        raise UserError(f"{classes} has no directories, of which each would be a class")
    return FolderSource(directory / split, names)


def _directories(directory: Path) -> list[str]:
    return [name for name in _entries(directory) if (directory / name).is_dir()]


def _entries(directory: Path) -> list[str]:
    """Names in a directory, in alphabetical order, without hidden ones."""
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    for name in names:
        if not name.isprintable():  # bytes that are no UTF-8 as well, which nothing can write
            raise UserError(
                f"{directory} has a file or directory of the name {name!a}, which cannot be "
                "shown; rename it"
            )
    return names


def _images(directory: Path) -> Iterator[str]:
    """Image files in a directory and those below it, relative to it, in alphabetical order."""
    for name in _entries(directory):
        if (directory / name).is_dir():
            yield from (f"{name}/{file}" for file in _images(directory / name))
        elif name.lower().endswith(IMAGES):
            yield name


def _open_tfds(name: str, dataset: str, split: str, data_dir: str) -> Source:
    import tensorflow_datasets as tfds

    import resnet_flax.data.digits  # noqa: F401  registers the builder

    builder = _builder(dataset, data_dir)
    if not builder.info.splits and dataset in EMBEDDED:
        prepare(dataset, data_dir)
        builder = _builder(dataset, data_dir)
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}; prepare it with "
            f"`resnet-flax data prepare {name}`, or say where it is by --data_dir (in a run, "
            "--config.data.data_dir)"
        )
    features = builder.info.features
    labels = SEVERAL_LABELS.get(dataset.partition("/")[0].partition(":")[0], ("label", "", {}))
    if not {"image", labels[0]} <= set(features):
        raise UserError(f"{name} is no image-classification set: it needs 'image' and 'label'")
    # Decoded by us: TFDS takes OpenCV where it is installed, Pillow where not.
    decoders = {"image": tfds.decode.SkipDecoding()}
    if not getattr(features[labels[0]], "names", None):
        raise UserError(f"the labels of {name} are numbers without classes; they must be classes")
    try:
        examples = builder.as_data_source(split=split, decoders=decoders)
        return TfdsSource(
            name,
            examples,
            tuple(features[labels[0]].names),
            features["image"].shape[-1],
            labels[:2],
            labels[2].get(split) if labels[1] else len(examples),
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{name} has no split {split!r}, or none with examples "
            f"(it has {', '.join(builder.info.splits)})"
        ) from error


def _builder(dataset: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return _array_record(tfds.builder(dataset, data_dir=data_dir or None))
    except tfds.core.registered.DatasetNotFoundError as error:
        near = closest(dataset, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"TFDS has no data set called {dataset!r}{near}") from error
    except UserError:
        raise
    except Exception as error:  # of all kinds: names, versions, damaged files
        raise UserError(f"TFDS cannot make {dataset!r} out: {first_line(error)}") from error


def _array_record(builder: Any) -> Any:
    """A builder that reads and writes array_record, which TFDS's default is not."""
    import tensorflow_datasets as tfds

    wanted = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    if builder.info.splits and builder.info.file_format != wanted:
        there = builder.data_dir
        raise UserError(
            f"{there} is prepared as {builder.info.file_format.value}, which cannot be read at "
            "random; convert it by `python -m tensorflow_datasets.scripts.convert_format "
            f"--dataset_version_dir={there} --out_file_format=array_record "
            "--out_dir=DIR/NAME/VERSION` and give DIR as --data_dir"
        )
    if not builder.info.splits:
        builder.info.set_file_format(wanted, override=True)
    return builder


def splits_of(name: str, data_dir: str = "") -> tuple[str, ...]:
    """The names of a data set's splits; see `open_source` for the arguments."""
    kind, _, where = name.partition(":")
    if kind == "folder" and where:
        return tuple(_directories(Path(where).expanduser()))
    if kind != "tfds" or not where:
        raise UserError(f"a data set is written tfds:NAME or folder:DIR, not {name!r}")
    import resnet_flax.data.digits  # noqa: F401  registers the builder

    splits = _builder(where, data_dir).info.splits
    return tuple(splits) or ("train",)  # which then says that the set is not prepared


def prepare(dataset: str, data_dir: str = "") -> str:
    """Downloads and writes a TFDS set, once; another process may be doing so at the same time.

    Returns:
      The directory that it lies in.

    Raises:
      UserError: there is no such set, or it cannot be downloaded or written.
    """
    import tensorflow_datasets as tfds

    import resnet_flax.data.digits  # noqa: F401  registers the builder

    builder = _builder(dataset, data_dir)
    print(f"preparing {dataset} in {builder.data_dir}", flush=True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Unknown size (download: Unknown ..."
            builder.download_and_prepare()
    except Exception as error:  # of all kinds: disk, network, TensorFlow that is not there
        builder = _builder(dataset, data_dir)
        if not builder.info.splits:  # it was not another process that got there first
            missing = isinstance(error, ImportError) or "tensorflow" in str(error).lower()
            hint = (
                "it needs TensorFlow: pip install 'resnet_flax[prepare]'"
                if missing
                else "give a directory that can be written as --data_dir (in a run, "
                "--config.data.data_dir)"
                if isinstance(error, OSError)
                else "its page on tensorflow.org/datasets says what it needs"
            )
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(
                f"cannot prepare {dataset} in {builder.data_dir}: {reason}; {hint}"
            ) from error
    return str(builder.data_dir)
