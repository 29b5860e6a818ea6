"""Where examples come from: random access to `{image, label}`, with class names.

`SOURCES` is the table of stores; each has a file here. They are imported when they are needed:
help pages list their config keys, without the second that importing them takes.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from resnet_flax.data.class_names import unusable
from resnet_flax.errors import SettingError, UserError
from resnet_flax.keys import Entry, Key, Value

if TYPE_CHECKING:
    from resnet_flax.data.sources.arrays import ArraySource
    from resnet_flax.data.sources.folder import FolderSource
    from resnet_flax.data.sources.parts import Share, hold_out
    from resnet_flax.data.sources.tfds import TfdsSource

__all__ = [
    "GIVEN",
    "SOURCES",
    "ArraySource",
    "FolderSource",
    "Share",
    "Source",
    "Store",
    "TfdsSource",
    "check_source",
    "hold_out",
    "open_source",
    "splits_of",
    "without_auto",
]

# `data.source` of a run on data that only the program that started it has.
GIVEN = "given:python"

_FILES = {
    "ArraySource": "arrays",
    "FolderSource": "folder",
    "Share": "parts",
    "TfdsSource": "tfds",
    "hold_out": "parts",
}


if not TYPE_CHECKING:  # see resnet_flax/__init__.py

    def __getattr__(name: str) -> Any:
        if name in _FILES:
            return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@runtime_checkable
class Source(Protocol):
    """A data set split: any number of examples, by index.

    An example is `image`, a Pillow image or an array `[h, w, c]` uint8, and `label`, an index
    into `class_names`; for data sets with several correct labels also `valid_labels`, `[classes]`
    bool. A source that has a method `fingerprint`, which returns a dict of JSON, is compared by it
    when a run continues; otherwise only by its number of examples and its classes.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Store(Entry):
    """A kind of data source.

    Attributes:
      make: opens a split: `(where, split, class_names, **options) -> Source`. `where` follows the
        colon in `data.source`, `class_names` are those of the training split or empty, and the
        options are the values of its keys, by the last part of their names.
      splits: `(where, **options) -> names`, the names of the splits.
    """

    splits: Callable[..., tuple[str, ...]] = lambda where, **options: ("train",)
    # As torchvision's loader and TFDS do, for published figures.
    automatic: Mapping[str, Value] = dataclasses.field(
        default_factory=lambda: {"data.exif": "off", "data.alpha": "drop"}
    )


def _open_folder(where: str, split: str, class_names: tuple[str, ...]) -> Source:
    from resnet_flax.data.sources.folder import open_folder

    return open_folder(where, split, class_names)


def _folder_splits(where: str) -> tuple[str, ...]:
    from resnet_flax.data.sources.folder import folder_splits

    return folder_splits(where)


def _open_tfds(where: str, split: str, class_names: tuple[str, ...], data_dir: str = "") -> Source:
    from resnet_flax.data.sources.tfds import open_tfds

    del class_names
    return open_tfds(f"tfds:{where}", where, split, data_dir)


def _tfds_splits(where: str, data_dir: str = "") -> tuple[str, ...]:
    from resnet_flax.data.sources.tfds import tfds_splits

    return tfds_splits(where, data_dir)


# By the part of `data.source` before the colon.
SOURCES: dict[str, Store] = {
    "tfds": Store(
        _open_tfds,
        {
            "data.data_dir": Key(
                "",
                "Directory with TensorFlow Datasets (TFDS) data; empty for TFDS_DATA_DIR, or "
                "~/tensorflow_datasets.",
                None,
                True,
            )
        },
        splits=_tfds_splits,
    ),
    "folder": Store(
        _open_folder,
        splits=_folder_splits,
        automatic={"data.exif": "on", "data.alpha": "white"},
    ),
}


_UNNAMED = Store(lambda *_: None)


def open_source(
    name: str, split: str, data_dir: str = "", class_names: tuple[str, ...] = (), **options: Any
) -> Source:
    """Opens a split of a data set.

    The data set that comes with this package (digits) is prepared first if needed.

    Args:
      name: 'tfds:NAME' for TFDS, 'folder:DIR' for images in DIR/train/CLASS and DIR/val/CLASS, or
        another entry of `SOURCES`.
      split: a TFDS split, which may be a slice such as 'train[:90%]', or a subdirectory of DIR.
      data_dir: of TFDS; empty for its default (~/tensorflow_datasets or TFDS_DATA_DIR).
      class_names: of a folder; by default those of DIR/train, or of the split itself if there is no
        DIR/train, in the order of `class_names.ordered`.
      **options: of other stores, see `Store`.

    Raises:
      UserError: there is no such data set or split, it is not prepared, is empty, or lacks images
        or labels.
    """
    store, where = _store(name)
    found = store.make(where, split, class_names, **_of(store, {"data_dir": data_dir, **options}))
    return check_source(found, name, f"the split {split!r} of {name}")


def check_source(source: Any, name: str, split: str = "") -> Source:
    """The source, if it is one.

    Args:
      source: any object.
      name: what errors call the data set.
      split: what they call this part of it.

    Raises:
      UserError: it lacks something, or has no examples or no names of classes.
    """
    wanted = ("class_names", "__len__", "__getitem__")
    lacking = [attribute for attribute in wanted if not hasattr(source, attribute)]
    if lacking:
        raise UserError(
            f"{name} is not a data source: its {type(source).__name__} has no "
            f"{' and no '.join(lacking)}; see resnet_flax.data.sources.Source"
        )
    if not len(source):
        raise UserError(f"{split or name} has no examples; give another one, or add some")
    names = source.class_names
    if isinstance(names, str) or not names or not all(isinstance(one, str) for one in names):
        raise UserError(
            f"class_names of {name} must be a tuple of strings, one for each class, not {names!r}"
        )
    bad = next(filter(unusable, names), None)
    if bad is not None:
        raise UserError(
            f"class_names of {name} have {bad!a}; the name of a class must be text without line "
            "breaks and control characters"
        )
    found: Source = source
    return found


def splits_of(name: str, data_dir: str = "", **options: Any) -> tuple[str, ...]:
    """The names of a data set's splits; see `open_source` for the arguments."""
    store, where = _store(name)
    # If there are none, opening any split says that the data set is not prepared.
    return store.splits(where, **_of(store, {"data_dir": data_dir, **options})) or ("train",)


def without_auto(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `data.*` by the last part of their keys; those that are 'auto' as the store says.

    Args:
      name: see `open_source`, or empty for data without a name.
      values: of a config; a checked one has none that are 'auto'.
    """
    automatic = SOURCES.get(name.partition(":")[0], _UNNAMED).automatic
    return {
        key: automatic.get(f"data.{key}", value) if value == "auto" else value
        for key, value in values.items()
    }


def _store(name: str) -> tuple[Store, str]:
    if name == GIVEN:
        raise SettingError(
            "the run was trained on arrays that a Python program gave to it; give them to "
            "resnet_flax.train again, or name other data as",
            "data.source",
        )
    kind, _, where = name.partition(":")
    if kind not in SOURCES or not where:
        raise UserError(
            f"a data set must be tfds:NAME or folder:DIR, such as tfds:digits, not {name!r}"
            + (f" (there are also {', '.join(list(SOURCES)[2:])})" if len(SOURCES) > 2 else "")
        )
    return SOURCES[kind], where


def _of(store: Store, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a store has keys for, by default those of the keys."""
    defaults = {name.rpartition(".")[2]: key.default for name, key in store.keys.items()}
    return {name: options.get(name, default) for name, default in defaults.items()}
