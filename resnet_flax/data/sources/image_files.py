"""Which files of a folder are read as images, what is left out, and what torchvision would read."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import features

from resnet_flax.errors import UserError, shown

# Suffixes that torchvision's `ImageFolder` reads (torchvision.datasets.folder.IMG_EXTENSIONS).
TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Suffixes that are read here; of a file with several images, the first one is.
IMAGES = (*TORCHVISION, ".jpe", ".jfif", ".gif", ".avif", ".jp2")
# Formats that Pillow may be built without. The images of a folder must not depend on that.
_OPTIONAL = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000"}
# Names with these beginnings are never read: hidden ones, and what macOS adds to archives.
HIDDEN = (".", "__MACOSX")
# What a split is usually called.
USUAL_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
# Why files are left out that a user wants left out.
HIDDEN_FILES = "hidden, as their names begin with a dot or __MACOSX"
# Number of names that a message gives.
NAMED = 3


def is_image(name: str) -> bool:
    """Whether a file with that name is read as an image."""
    return name.lower().endswith(IMAGES)


def is_usual_split(split: str) -> bool:
    """Whether a split is often called so."""
    return split.lower() in USUAL_SPLITS


def check_formats(files: Iterable[str]) -> None:
    """Raises UserError if Pillow was built without a format of the files."""
    missing = tuple(suffix for suffix, name in _OPTIONAL.items() if not features.check(name))
    found = [file for file in files if file.lower().endswith(missing)] if missing else []
    if found:
        raise UserError(
            f"{count(found)} ending in {_suffixes(found)} cannot be read by this Pillow "
            f"({some(found)}); install a newer one (pip install -U pillow), or convert them"
        )


def left_out(directory: Path, read: Collection[str]) -> dict[str, list[str]]:
    """The files below a split's directory that are not read.

    Args:
      directory: of the split.
      read: the images that are, relative to it.

    Returns:
      Their names for each reason, which continues '3 files ...'.
    """
    read = frozenset(read)
    found: dict[str, list[str]] = {}
    for file in walk(directory):
        if file not in read:
            found.setdefault(_reason(file), []).append(file)
    return found


def _reason(file: str) -> str:
    if _hidden(file):
        return HIDDEN_FILES
    if is_image(file):  # all others of these are read
        return "beside the directories of the classes"
    return f"ending in {suffix_of(file)}" if suffix_of(file) else "without a suffix"


def torchvision_view(directory: Path, numbers: Mapping[str, int], read: Collection[str]) -> str:
    """How torchvision's `ImageFolder` would differ on a split's directory; empty if it would not.

    It numbers the directories of that split alone, in the order of their names, hidden ones too.

    Args:
      directory: of the split.
      numbers: the label of each directory that is read.
      read: the images that are, relative to `directory`.
    """
    with os.scandir(directory) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    theirs = {f for f in walk(directory) if "/" in f and f.lower().endswith(TORCHVISION)}
    without = sorted({*classes} - {file.partition("/")[0] for file in theirs})
    if without:
        return f"would refuse it, as it reads no image in {some(without)}"
    parts = [f"have {len(classes)} classes"] if len(classes) != len(numbers) else []
    if theirs != {*read}:
        parts.append(f"read {len(theirs):,} images")
        fewer, more = sorted({*read} - theirs), sorted(theirs - {*read})
        parts += [f"leave out {_suffixes(fewer)}"] if fewer else []
        parts += [f"read what is hidden ({some(more)})"] if more else []
    moved = [(c, i) for i, c in enumerate(classes) if numbers.get(c, i) != i]
    if moved:
        name, number = moved[0]
        parts.append(f"number {name} {number} and not {numbers[name]}")
    return f"would {'; '.join(parts)}" if parts else ""


def walk(directory: Path) -> list[str]:
    """All files below a directory, relative to it, sorted; links are followed."""
    found = []
    for where, _, names in os.walk(directory, followlinks=True):
        inner = os.path.relpath(where, directory).replace(os.sep, "/")
        found += names if inner == "." else [f"{inner}/{name}" for name in names]
    return sorted(found)


def beside_splits(directory: Path, splits: Collection[str]) -> list[str]:
    """The files and directories in a data set's directory that are no splits, sorted."""
    return sorted({*os.listdir(directory)} - {*splits})


def misplaced(directory: Path, there: Sequence[str]) -> str:
    """What to do if the images of a data set are in its directory or in subdirectories `there`."""
    images = _images_in(directory)
    if images and not there:
        place = f"{shown(directory)}/SPLIT/CLASS"
        return f"; its {count(images, 'image')} ({some(images)}) must be in {place}"
    flat = [name for name in there if not is_usual_split(name) and _images_in(directory / name)]
    if not flat or any(map(is_usual_split, there)):
        return ""
    return (
        f"; if {some(flat)} are classes, give folder:{shown(directory.parent)} and the split "
        f"{directory.name!r}"
    )


def no_classes(directory: Path) -> str:
    """Why a split's directory without subdirectories cannot be used."""
    images, where = _images_in(directory), shown(directory)
    if not images:
        return f"{where} has no subdirectories; there must be one for each class, with images"
    if images[0].startswith("ILSVRC2012_test_"):
        remedy = "they are ImageNet's test images, whose classes are not public: give another split"
    else:
        how = " as docs/data.md shows" if images[0].startswith("ILSVRC2012_val_") else ""
        remedy = f"move each into a subdirectory named after its class{how}, or give another split"
    return (
        f"{where} has no subdirectories for classes, but {count(images, 'image')} directly in "
        f"it ({some(images)}); {remedy}"
    )


def no_images(directory: Path) -> str:
    """Why a class's directory without images cannot be used."""
    others = [file for file in walk(directory) if not _hidden(file)]
    has = f"{count(others)} ({some(others)}) but no image" if others else "no images"
    return f"{shown(directory)} has {has} ({', '.join(IMAGES)}); add some, or remove it"


def count(names: Collection[str], noun: str = "file") -> str:
    """Such as '3 files'."""
    return f"{len(names):,} {noun}{'s' * (len(names) != 1)}"


def some(names: Sequence[str]) -> str:
    """The first names."""
    return ", ".join([*map(shown, names[:NAMED]), *["..."] * (len(names) > NAMED)])


def suffix_of(file: str) -> str:
    """Such as '.jpg'; empty for none."""
    return os.path.splitext(file)[1].lower()


def _suffixes(files: Iterable[str]) -> str:
    return ", ".join(sorted({*map(suffix_of, files)}))


def _hidden(file: str) -> bool:
    return any(part.startswith(HIDDEN) for part in file.split("/"))


def _images_in(directory: Path) -> list[str]:
    """Images directly in a directory."""
    try:
        return sorted(n for n in os.listdir(directory) if is_image(n) and not _hidden(n))
    except OSError:
        return []
