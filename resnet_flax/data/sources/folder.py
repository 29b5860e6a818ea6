"""Images in directories, one for each class."""

import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_flax.data.class_names import composed, ordered, positions, reordering, unusable
from resnet_flax.data.decoding import load
from resnet_flax.data.sources import Source, image_files
from resnet_flax.errors import UserError, closest, shown
from resnet_flax.runtime import distributed, storage
from resnet_flax.runtime.terminal import say


class FolderSource:
    """RGB images in a directory with one subdirectory for each class.

    Args:
      directory: of the split, such as /data/imagenet/train.
      class_names: the names of its subdirectories, in any Unicode form; any other subdirectory is
        an error.
    """

    def __init__(self, directory: Path, class_names: tuple[str, ...]) -> None:
        self._directory = directory
        self.class_names = tuple(map(composed, class_names))
        self._files: list[str] = []
        sizes: list[int] = []
        labels: list[int] = []
        names = _class_directories(directory)
        found = positions(names, self.class_names)
        for name, label in zip(names, found, strict=True):
            if label is None:
                raise UserError(
                    f"{shown(directory / name)} is a class without training images"
                    f"{closest(name, class_names)}; remove it, or add training images of it"
                )
            images = list(_images(directory / name))
            if not images:
                raise UserError(image_files.no_images(directory / name))
            self._files += [f"{name}/{file}" for file, _ in images]
            sizes += [size for _, size in images]
            labels += [label] * len(images)
        image_files.check_formats(self._files)
        self._labels = np.array(labels, np.int32)
        self._sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._directory / self._files[index]
        return {"image": load(path, shown(path), 3), "label": self._labels[index]}

    def in_order_of(self, class_names: Sequence[str]) -> "FolderSource":
        """The same examples, labeled by their classes' positions in another list of these."""
        order = reordering(self.class_names, class_names)
        if order is None:
            return self
        other = copy.copy(self)
        other.class_names = tuple(map(composed, class_names))
        other._labels = np.array(order, np.int32)[self._labels]
        return other

    @property
    def files(self) -> list[tuple[str, int]]:
        """`CLASS/NAME` and size in bytes of each image."""
        return list(zip(self._files, self._sizes.tolist(), strict=True))

    def left_out(self) -> dict[str, list[str]]:
        """See `image_files.left_out`."""
        return image_files.left_out(self._directory, self._files)

    def torchvision_view(self) -> str:
        """See `image_files.torchvision_view`."""
        directories = (file.partition("/")[0] for file in self._files)
        numbers = dict(zip(directories, self._labels.tolist(), strict=True))
        return image_files.torchvision_view(self._directory, numbers, self._files)

    def first_images(self) -> dict[str, bytes]:
        """For each class's directory the bytes of its first image file, up to 64 KiB."""
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


def open_folder(where: str, split: str, class_names: tuple[str, ...] = ()) -> FolderSource:
    """Opens images in WHERE/SPLIT/CLASS.

    Args:
      where: a directory.
      split: a subdirectory of it.
      class_names: by default those of WHERE/train, or of the split itself if there is no
        WHERE/train, in the order of `class_names.ordered`.

    Raises:
      UserError: there is no such directory, or it has no images.
    """
    directory = storage.local(where)
    splits = _directories(directory)
    if split not in splits:
        raise UserError(
            f"{directory} has no directory {split!r} for that split{closest(split, splits)} "
            f"(it has {', '.join(splits[:10]) or 'none'})"
            f"{image_files.misplaced(directory, splits)}"
        )
    classes = directory / ("train" if "train" in splits else split)
    names = class_names or ordered(_class_directories(classes))
    if not names:
        raise UserError(image_files.no_classes(classes))
    source = FolderSource(directory / split, names)
    if not len(source):
        raise UserError(image_files.no_classes(directory / split))
    return source


def folder_splits(where: str) -> tuple[str, ...]:
    """The names of a directory's subdirectories that are splits.

    Others, such as __MACOSX or docs, have another name than a split usually has, and no class of
    `train` in them, or where there is no `train`, no class with images.
    """
    directory = storage.local(where)
    names = _directories(directory)
    classes = {*_directories(directory / "train")} if "train" in names else None
    return tuple(
        name
        for name in names
        if image_files.is_usual_split(name) or _is_split(directory / name, classes)
    )


def _is_split(directory: Path, classes: set[str] | None) -> bool:
    with contextlib.suppress(UserError):  # such as lost+found, which cannot be read
        inner = _directories(directory)
        if classes is not None:
            return not classes.isdisjoint(inner)
        return any(next(_images(directory / name), None) for name in inner)
    return False


def note_left_out(source: Source, split: str) -> None:
    """Prints a note on the files of a folder that are not read; hidden ones are meant to be so."""
    if not isinstance(source, FolderSource) or not distributed.is_primary():
        return
    found = source.left_out()
    found.pop(image_files.HIDDEN_FILES, None)
    listed = "; ".join(
        f"{image_files.count(files)} {reason} ({image_files.some(files)})"
        for reason, files in found.items()
    )
    if listed:
        say(f"note: the split {split!r} leaves out {listed}", sys.stderr)


def _directories(directory: Path) -> list[str]:
    return [entry.name for entry in _entries(directory) if entry.is_dir()]


def _class_directories(directory: Path) -> list[str]:
    """The names of the directories of classes, as text in one Unicode form is sorted.

    The order of examples follows from this one, not from that of the classes, see `ordered`.
    """
    names = _directories(directory)
    for name in names:
        if unusable(name):
            raise UserError(
                f"{shown(directory)} has a directory named {name!a}; the name of a class must be "
                "valid UTF-8 without line breaks and control characters: rename it"
            )
    return sorted(names, key=composed)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries of a directory, in alphabetical order, without hidden ones."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{shown(directory)} cannot be read: {error.strerror}") from error
    return [entry for entry in entries if not entry.name.startswith(image_files.HIDDEN)]


def _images(directory: Path) -> Iterator[tuple[str, int]]:
    """Image files below a directory, relative to it, in alphabetical order.

    Yields:
      The name and the size in bytes, 0 if that is unknown, as for a broken link.
    """
    for entry in _entries(directory):
        image = image_files.is_image(entry.name)
        if (image or entry.is_dir()) and not _is_utf8(entry.name):
            raise UserError(
                f"{shown(directory)} has a file or directory named {entry.name!a}, which is not "
                "valid UTF-8; rename it"
            )
        if entry.is_dir():
            inner = _images(directory / entry.name)
            yield from ((f"{entry.name}/{file}", size) for file, size in inner)
        elif image:
            try:
                yield entry.name, entry.stat().st_size
            except OSError:
                yield entry.name, 0


def _is_utf8(name: str) -> bool:
    """Whether a file's name can be encoded again; Python has other bytes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
