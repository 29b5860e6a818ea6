"""Where examples come from: random access to `{image, label}`, with class names."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sampler import permutation
from resnet_flax.data.tfds_source import open_tfds, tfds_splits
from resnet_flax.data.transforms import load, to_array
from resnet_flax.errors import UserError, closest

# File names that count as images in a folder.
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@runtime_checkable
class Source(Protocol):
    """A data set split: any number of examples, by index.

    An example is `image`, a Pillow image or an array `[h, w, c]` uint8, and `label`, an index
    into `class_names`; for data sets with several correct labels also `valid_labels`, `[classes]`
    bool.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class FolderSource:
    """RGB images in a directory with one subdirectory for each class.

    Args:
      directory: of the split, such as /data/imagenet/train.
      class_names: the names of its subdirectories; any other subdirectory is an error.
    """

    def __init__(self, directory: Path, class_names: tuple[str, ...]) -> None:
        self._directory, self.class_names = directory, class_names
        self._files: list[str] = []
        sizes: list[int] = []
        labels: list[int] = []
        known = {name: label for label, name in enumerate(class_names)}
        for name in _directories(directory):
            if name not in known:
                raise UserError(
                    f"{directory / name} is a class without training images"
                    f"{closest(name, known)}; remove it, or add training images of it"
                )
            images = list(_images(directory / name))
            if not images:
                raise UserError(
                    f"{directory / name} has no images ({', '.join(IMAGES)}); add some, or "
                    "remove it"
                )
            self._files += [f"{name}/{file}" for file, _ in images]
            sizes += [size for _, size in images]
            labels += [known[name]] * len(images)
        self._labels = np.array(labels, np.int32)
        self._sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._directory / self._files[index]
        return {"image": load(path, str(path), 3), "label": self._labels[index]}

    @property
    def files(self) -> list[tuple[str, int]]:
        """`CLASS/NAME` and size in bytes of each image."""
        return list(zip(self._files, self._sizes.tolist(), strict=True))

    def first_images(self) -> dict[str, bytes]:
        """For each class the bytes of its first image file, up to 64 KiB."""
        first: dict[str, bytes] = {}
        for file in self._files:
            name = file.partition("/")[0]
            if name not in first:
                try:
                    with (self._directory / file).open("rb") as opened:
                        first[name] = opened.read(2**16)
                except OSError:  # reported when it is read as an image
                    first[name] = b""
        return first


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
                f"images must be uint8 [n, height, width, channels], not {images.dtype} of "
                f"{list(images.shape)}"
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


class _Chunks:
    """A source's examples in chunks of hundreds, which are faster to pass between threads."""

    size = 256

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return -(-len(self._source) // self.size)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        first = index * self.size
        return [self._source[i] for i in range(first, min(first + self.size, len(self._source)))]


def in_memory(source: Source, patience: Patience = PATIENT) -> ArraySource:
    """All of a source's images, decoded once.

    Args:
      source: examples.
      patience: see `readers.reading`.

    Raises:
      UserError: they differ in size.
    """
    images: np.ndarray | None = None
    labels = np.zeros(len(source), np.int32)
    with reading(_Chunks(source), 0, patience) as chunks:
        for i, example in enumerate(itertools.chain.from_iterable(chunks)):
            image, labels[i] = to_array(example["image"]), example["label"]
            if images is None:
                images = np.empty((len(source), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"only images of the same size can be kept in memory, but number 0 has shape "
                    f"{images.shape[1:]} and number {i} {image.shape}; set data.in_memory and "
                    "data.resident to False"
                )
            images[i] = image
    return ArraySource(images, labels, source.class_names)


def open_source(
    name: str, split: str, data_dir: str = "", class_names: tuple[str, ...] = ()
) -> Source:
    """Opens a split of a data set.

    The data set that comes with this package (digits) is prepared first if needed.

    Args:
      name: 'tfds:NAME' for TFDS, or 'folder:DIR' for images in DIR/train/CLASS and DIR/val/CLASS.
      split: a TFDS split, which may be a slice such as 'train[:90%]', or a subdirectory of DIR.
      data_dir: of TFDS; empty for its default (~/tensorflow_datasets or TFDS_DATA_DIR).
      class_names: of a folder; by default those of DIR/train, or of the split itself if there is no
        DIR/train, in alphabetical order.

    Raises:
      UserError: there is no such data set or split, it is not prepared, or lacks images or labels.
    """
    kind, _, where = name.partition(":")
    if kind == "tfds" and where:
        return open_tfds(name, where, split, data_dir)
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
        raise UserError(f"{classes} has no subdirectories; there must be one for each class")
    return FolderSource(directory / split, names)


def _directories(directory: Path) -> list[str]:
    return [entry.name for entry in _entries(directory) if entry.is_dir()]


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries of a directory, in alphabetical order, without hidden ones."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in entries:
        if not entry.name.isprintable():  # nor is a name that is not valid UTF-8
            raise UserError(
                f"{directory} has a file or directory named {entry.name!a}, which cannot be "
                "printed; rename it"
            )
    return entries


def _images(directory: Path) -> Iterator[tuple[str, int]]:
    """Image files below a directory, relative to it, in alphabetical order.

    Yields:
      The name and the size in bytes, 0 if that is unknown, as for a broken link.
    """
    for entry in _entries(directory):
        if entry.is_dir():
            inner = _images(directory / entry.name)
            yield from ((f"{entry.name}/{file}", size) for file, size in inner)
        elif entry.name.lower().endswith(IMAGES):
            try:
                yield entry.name, entry.stat().st_size
            except OSError:
                yield entry.name, 0


def splits_of(name: str, data_dir: str = "") -> tuple[str, ...]:
    """The names of a data set's splits; see `open_source` for the arguments."""
    kind, _, where = name.partition(":")
    if kind == "folder" and where:
        return tuple(_directories(Path(where).expanduser()))
    if kind != "tfds" or not where:
        raise UserError(f"a data set must be tfds:NAME or folder:DIR, not {name!r}")
    return tfds_splits(where, data_dir) or (
        "train",
    )  # its error says that the data set is not prepared
