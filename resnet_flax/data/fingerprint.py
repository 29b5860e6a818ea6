"""Fingerprints of data sets: taken when a run begins, compared when it continues."""

import gzip
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from resnet_flax.data.class_names import composed
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.folder import FolderSource
from resnet_flax.data.sources.parts import whole
from resnet_flax.data.sources.tfds import TfdsSource
from resnet_flax.errors import UserError, shown
from resnet_flax.runtime import storage

Files = dict[str, int]
# Number of differences of each kind that a message names.
NAMED = 3


def take(source: Source) -> dict[str, Any]:
    """The fingerprint of a source, as it is saved in a checkpoint.

    For a folder: the names and sizes of its images and the contents of the first one of each class;
    for a TFDS set: its version and the names, sizes and first 64 KiB of its files. Directories and
    file times are not part of it, nor are other contents: if an image is replaced by another of the
    same size, that may not be detected.

    Args:
      source: from `open_source`, or a subset of one.

    Returns:
      JSON: `kind`, `count` of examples, `class_names`; for a folder `classes`, with each class's
      count of images, a digest of their names and sizes, and a digest of the first image; for a
      TFDS set `set`, `files` and `digests`; for others what their method `fingerprint` returns.
    """
    source = whole(source)
    names = list(map(composed, source.class_names))
    found: dict[str, Any] = {"count": len(source), "class_names": names}
    if isinstance(source, FolderSource):
        classes = _classes(source.files)
        for name, first in source.first_images().items():
            classes[composed(name)].append(sha256(first).hexdigest()[:16])
        return {"kind": "folder", **found, "classes": classes}
    if isinstance(source, TfdsSource):
        return {"kind": "tfds", **found, **source.fingerprint()}
    kind = type(source).__name__
    own = getattr(source, "fingerprint", dict)
    own = own() if callable(own) else own
    try:
        own = json.loads(json.dumps(dict(own)))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the method fingerprint of {kind} must return a dict of JSON, such as "
            f"{{'version': 1}}, not {own!r}"
        ) from error
    return {"kind": kind, **found, **own}


def _classes(files: Sequence[tuple[str, int]]) -> dict[str, list[Any]]:
    """For each class its number of images and a digest of their names and sizes."""
    counts: dict[str, int] = {}
    hashes: dict[str, Any] = {}
    for file, size in files:
        name, _, image = file.partition("/")
        name = composed(name)
        counts[name] = counts.get(name, 0) + 1
        hashes.setdefault(name, sha256()).update(f"{image}\0{size}\n".encode())
    return {name: [counts[name], digest.hexdigest()[:16]] for name, digest in hashes.items()}


def listing(source: Source) -> Files:
    """Names and sizes of a folder's images; empty for other sources."""
    source = whole(source)
    return dict(source.files) if isinstance(source, FolderSource) else {}


def write_listings(path: Path, listings: dict[str, Files]) -> None:
    """Writes the listings of splits, from which `differences` gets the names of images."""
    storage.write(path, gzip.compress(json.dumps(listings).encode(), mtime=0))


def read_listings(path: Path) -> dict[str, Files]:
    """What `write_listings` wrote; empty if the file is missing or damaged."""
    try:
        found = json.loads(gzip.decompress(storage.read(path)))
    except (OSError, ValueError, EOFError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(
    before: dict[str, Any], now: dict[str, Any], listed: Files, files: Files
) -> list[str]:
    """Short descriptions of the differences between two fingerprints; empty if they are equal.

    Args:
      before: from a checkpoint.
      now: from `take`.
      listed: the images at that time, if known.
      files: the images now.

    Returns:
      At most a few dozen words per kind of difference: classes, then files, then counts.
    """
    if "digests" not in before:
        now = without_digests(now)
    reordered = _reordered(before)
    before = _composed(before)
    if before == now:
        return reordered
    if before.get("kind") != now["kind"]:
        return [f"it is of kind {now['kind']} and was of kind {before.get('kind')}"]
    found, both = _class_differences(before, now)
    found += reordered
    if before.get("set") != now.get("set"):
        found.append(f"it is {now.get('set')} and was {before.get('set')}")
    if now["kind"] == "tfds":
        found += _file_differences(_with_digests(before), _with_digests(now))
    elif now["kind"] == "folder":
        changed = [c for c in both if before["classes"].get(c) != now["classes"].get(c)]
        # The listing is used only if it matches the checkpoint.
        if changed and listed and _classes(list(listed.items())) == _names(before["classes"]):
            found += _file_differences(_of(changed, listed), _of(changed, files))
        else:
            found += _count_differences(changed, before["classes"], now["classes"])
        then, there = before["classes"], now["classes"]
        # Names and sizes are the same, so the contents of images differ.
        exchanged = [c for c in changed if then.get(c, [])[:2] == there.get(c, [])[:2]]
        if exchanged:
            verb = "has" if len(exchanged) == 1 else "have"
            found.append(f"class{_es(exchanged)} {_list(exchanged)} {verb} other images")
    if before["count"] != now["count"]:
        found.append(f"there are {now['count']:,} examples and were {before['count']:,}")
    return found or ["its fingerprint differs"]


def without_digests(found: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint as it was before 2026-11-29, when a TFDS set had no `digests`."""
    if found.get("kind") != "tfds":
        return found
    return {name: value for name, value in found.items() if name != "digests"}


def _composed(found: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint with the names of classes in one Unicode form, which older ones lack."""
    found = {**found, "class_names": list(map(composed, found["class_names"]))}
    if found.get("kind") == "folder" and "classes" in found:
        found["classes"] = {composed(name): value for name, value in found["classes"].items()}
    return found


def _reordered(before: dict[str, Any]) -> list[str]:
    """A difference if a folder's images were in another order: once, names were not composed."""
    names = before.get("classes", {})
    if [*map(composed, sorted(names))] == sorted(map(composed, names)):
        return []
    return ["its images are in another order, as names of classes are in another Unicode form"]


def _class_differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The differences between the classes, and the classes that are in both."""
    then, names = before["class_names"], now["class_names"]
    gone = [name for name in then if name not in names]
    new = [name for name in names if name not in then]
    found = []
    for name in list(gone):
        same = before.get("classes", {}).get(name)
        called = [other for other in new if same and now["classes"].get(other) == same]
        if called:
            found.append(f"class {name} is called {called[0]} now")
            gone.remove(name)
            new.remove(called[0])
    found += [f"class{_es(gone)} {_list(gone)} removed"] if gone else []
    found += [f"class{_es(new)} {_list(new)} added"] if new else []
    number = {name: i for i, name in enumerate(then)}
    moved = [name for i, name in enumerate(names) if number.get(name, i) != i]
    if not found and then != names:
        found.append("its classes are in another order")
    elif moved and len(then) == len(names):  # with as many classes, a network could be trained on
        first = f"class {moved[0]} is number {names.index(moved[0])} and was {number[moved[0]]}"
        found.append(f"{first} (and so on, {len(moved)} in all)" if len(moved) > 1 else first)
    return found, [name for name in names if name in then]


def _with_digests(found: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The size and the digest of each file of a TFDS set."""
    digests = found.get("digests", {})
    return {name: (size, digests.get(name, "")) for name, size in found.get("files", {}).items()}


def _file_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    gone, new = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
    other = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    kinds = ((gone, "removed"), (new, "added"), (other, "changed"))
    return [
        f"{len(names)} file{_s(names)} {what}: {_list(names)}" for names, what in kinds if names
    ]


def _count_differences(
    classes: Sequence[str], before: dict[str, list[Any]], now: dict[str, list[Any]]
) -> list[str]:
    found = []
    for name in classes:
        then, there = before.get(name, [0, ""]), now.get(name, [0, ""])
        if then[0] != there[0]:
            count = f"{there[0]:,} image{_s(range(there[0]))}"
            found.append(f"class {name} has {count} and had {then[0]:,}")
        elif then[1] != there[1]:
            found.append(f"images of class {name} have other names or sizes")
    return found


def _names(classes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The count, and the digest of names and sizes, of each class."""
    return {name: found[:2] for name, found in classes.items()}


def _of(classes: Sequence[str], files: Files) -> Files:
    return {
        name: size for name, size in files.items() if composed(name.partition("/")[0]) in classes
    }


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:NAMED])) + ", ..." * (len(names) > NAMED)


def _s(things: Any) -> str:
    return "s" * (len(things) != 1)


def _es(things: Any) -> str:
    return "es" * (len(things) != 1)
