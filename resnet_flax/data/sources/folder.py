"""Images in directories, one for each class."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resnet_flax.data.sources import Source, image_files
from resnet_flax.data.transforms import load
from resnet_flax.errors import UserError, closest
from resnet_flax.runtime import distributed, storage
from resnet_flax.runtime.terminal import say


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
                raise UserError(image_files.no_images(directory / name))
            self._files += [f"{name}/{file}" for file, _ in images]
            sizes += [size for _, size in images]
            labels += [known[name]] * len(images)
        image_files.check_formats(self._files)
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

    def left_out(self) -> dict[str, list[str]]:
        """See `image_files.left_out`."""
        return image_files.left_out(self._directory, self._files)

    def torchvision_view(self) -> str:
        """See `image_files.torchvision_view`."""
        directories = (file.partition("/")[0] for file in self._files)
        numbers = dict(zip(directories, self._labels.tolist(), strict=True))
        return image_files.torchvision_view(self._directory, numbers, self._files)

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
            f"{image_files.misplaced(directory, splits)}"
        )
    classes = directory / ("train" if "train" in splits else split)
    names = class_names or tuple(_directories(classes))
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


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """The entries of a directory, in alphabetical order, without hidden ones."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
    entries = [entry for entry in entries if not entry.name.startswith(image_files.HIDDEN)]
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
        elif image_files.is_image(entry.name):
            try:
                yield entry.name, entry.stat().st_size
            except OSError:
                yield entry.name, 0
