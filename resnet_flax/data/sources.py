"""Where examples come from: random access to `{image, label}`, with class names."""

import contextlib
import io
import logging
from typing import Any, Protocol, runtime_checkable

import numpy as np

from resnet_flax.errors import UserError, closest, first_line

# Data sets that this package can prepare by itself, from other packages' data.
EMBEDDED = ("digits",)


@runtime_checkable
class Source(Protocol):
    """A data set split: any number of examples, by index.

    An example is `image` `[h, w, c]` uint8 and `label`, an index into `class_names`.
    """

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class TfdsSource:
    """A split of a prepared TFDS image-classification set, read without TensorFlow."""

    def __init__(self, name: str, split: Any, class_names: tuple[str, ...]) -> None:
        self._name, self._split = name, split
        self.class_names = class_names

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
        return {"image": example["image"], "label": np.int32(example["label"])}


class ArraySource:
    """Examples held in memory.

    Args:
      images: `[n, h, w, c]` uint8.
      labels: `[n]`, indices into `class_names`.
      class_names: one for each label.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
    ) -> None:
        self._images, self._labels = images, labels.astype(np.int32)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


def in_memory(source: Source) -> ArraySource:
    """All of a source's images, of one size, decoded once."""
    examples = [source[i] for i in range(len(source))]
    images, labels = (np.stack([e[name] for e in examples]) for name in ("image", "label"))
    return ArraySource(images, labels, source.class_names)


def open_source(name: str, split: str, data_dir: str = "") -> Source:
    """The split of the data set that a config's `data.source` names.

    A set in `EMBEDDED` is prepared first where it is not yet.

    Args:
      name: 'tfds:NAME'.
      split: a TFDS split, slices included, such as 'train[:90%]'.
      data_dir: of TFDS; empty for its default (~/tensorflow_datasets or TFDS_DATA_DIR).

    Raises:
      UserError: there is no such set or split, it is not prepared, or has no images and labels.
    """
    kind, _, dataset = name.partition(":")
    if kind != "tfds" or not dataset:
        raise UserError(f"data.source must be tfds:NAME, such as tfds:digits, not {name!r}")

    import resnet_flax.data.digits  # noqa: F401  registers the builder

    # TFDS advises installing OpenCV each time it decodes; its files are small here.
    logging.getLogger("absl").addFilter(lambda r: "OpenCV is not installed" not in r.getMessage())
    builder = _builder(dataset, data_dir)
    if not builder.info.splits and dataset in EMBEDDED:
        builder = _prepare(dataset, data_dir)
    if not builder.info.splits:
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}; prepare it with "
            f"`tfds build {dataset} --file_format=array_record` (needs TensorFlow: the extra "
            "'prepare'), or say where it is by data.data_dir"
        )
    if not {"image", "label"} <= set(builder.info.features):
        raise UserError(f"{name} is no image-classification set: it needs 'image' and 'label'")
    names = tuple(builder.info.features["label"].names)
    try:
        return TfdsSource(name, builder.as_data_source(split=split), names)
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{name} has no split {split!r}, or none with examples "
            f"(it has {', '.join(builder.info.splits)})"
        ) from error


def _builder(dataset: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(dataset, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        near = closest(dataset, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"TFDS has no data set called {dataset!r}{near}") from error
    except Exception as error:  # of all kinds: names, versions, damaged files
        raise UserError(f"TFDS cannot make {dataset!r} out: {first_line(error)}") from error


def _prepare(dataset: str, data_dir: str) -> Any:
    """Writes an embedded data set, once; another process may be doing so at the same time."""
    import tensorflow_datasets as tfds

    builder = _builder(dataset, data_dir)
    print(f"preparing {dataset} in {builder.data_dir}", flush=True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Unknown size (download: Unknown ..."
            builder.download_and_prepare()
    except OSError as error:
        builder = _builder(dataset, data_dir)
        if not builder.info.splits:  # it was not another process that got there first
            raise UserError(
                f"cannot prepare {dataset} in {builder.data_dir}: {error.strerror or error}; "
                "give a directory that can be written as data.data_dir"
            ) from error
    return builder
