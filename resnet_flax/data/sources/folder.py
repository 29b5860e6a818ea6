"""Images in directories, one for each class."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_flax.data.decoding import load
from resnet_flax.errors import UserError, closest
from resnet_flax.runtime import storage

# File names that count as images in a folder.
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


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


def open_folder(where: str, split: str, class_names: tuple[str, ...] = ()) -> FolderSource:
    """Opens images in WHERE/SPLIT/CLASS.

    Args:
      where: a directory.
      split: a subdirectory of it.
      class_names: by default those of WHERE/train, or of the split itself if there is no
        WHERE/train, in alphabetical order.

    Raises:
      UserError: there is no such directory, or it has no images.
    """
    directory = storage.local(where)
    splits = _directories(directory)
    if split not in splits:
        raise UserError(
            f"{directory} has no directory {split!r} for that split{closest(split, splits)} "
            f"(it has {', '.join(splits[:10]) or 'none'})"
        )
    classes = directory / ("train" if "train" in splits else split)
    names = class_names or tuple(_directories(classes))
    if not names:
        raise UserError(f"{classes} has no subdirectories; there must be one for each class")
    return FolderSource(directory / split, names)


def folder_splits(where: str) -> tuple[str, ...]:
    """The names of a directory's subdirectories."""
    return tuple(_directories(storage.local(where)))


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
