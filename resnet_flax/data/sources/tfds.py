"""TensorFlow Datasets (TFDS), prepared and read without TensorFlow."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from resnet_flax.data.decoding import load
from resnet_flax.errors import SettingError, UserError, closest, first_line
from resnet_flax.runtime import storage
from resnet_flax.runtime.terminal import say

# Data sets that this package can prepare itself, from other packages' data.
EMBEDDED = ("digits",)

# Number of examples whose labels are checked when a split is opened.
SAMPLE = 32

# Data sets whose examples have any number of correct labels: the features with one label and with
# all of them, and the number of examples of a split that have any (Beyer et al. 2020, "Are we done
# with ImageNet?": 46,837 of 50,000).
SEVERAL_LABELS: dict[str, tuple[str, str, dict[str, int]]] = {
    "imagenet2012_real": ("original_label", "real_label", {"validation": 46_837}),
}


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
        version: str = "",
        files: Sequence[Path] = (),
        remedy: str = "prepare the data set again",
    ) -> None:
        self._name, self._split, self._channels = name, split, channels
        self._label, self._valid_labels = labels
        self.class_names, self.labelled = class_names, labelled
        self._version, self._files = version, tuple(files)
        self._remedy = remedy

    def __len__(self) -> int:
        return len(self._split)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: the set's name and version, and its files.

        A prepared data set has no checksums, and reading all of it may take hours. So a file is
        identified by its name, its size and a digest of its first 64 KiB.
        """
        files, digests = dict[str, int](), dict[str, str]()
        for path in self._files:
            try:
                files[path.name] = path.stat().st_size
                with path.open("rb") as opened:
                    digests[path.name] = sha256(opened.read(2**16)).hexdigest()[:16]
            except OSError as error:
                raise UserError(
                    f"{path} cannot be read: {error.strerror}; {self._remedy}"
                ) from error
        return {"set": self._version, "files": files, "digests": digests}

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._raw(int(index))
        name = f"example {index} of {self._name}"
        channels = self._channels if self._channels in (1, 4) else 3
        image = load(io.BytesIO(example["image"]), name, channels)
        found: dict[str, Any] = {"image": image, "label": self._checked(example, index)}
        if self._valid_labels:
            found["valid_labels"] = np.zeros(len(self.class_names), bool)
            found["valid_labels"][np.asarray(example[self._valid_labels], int)] = True
        return found

    def check_labels(self) -> None:
        """Raises UserError if an example has a label that is no class, as those of a test split.

        At most `SAMPLE` examples are read, evenly spaced, and no image is decoded.
        """
        for index in np.linspace(0, len(self) - 1, min(len(self), SAMPLE), dtype=int).tolist():
            self._checked(self._raw(index), index)

    def _raw(self, index: int) -> Mapping[str, Any]:
        try:
            return self._split[index]  # type: ignore[no-any-return]
        except Exception as error:  # readers and decoders raise errors of all types
            raise UserError(
                f"example {index} of {self._name} cannot be read ({first_line(error)}); "
                f"{self._remedy}"
            ) from error

    def _checked(self, example: Mapping[str, Any], index: int) -> np.int32:
        """The label of an example, all of whose labels are indices of classes."""
        for feature in filter(None, (self._label, self._valid_labels)):
            for label in np.atleast_1d(example[feature]):
                if not 0 <= label < len(self.class_names):
                    raise UserError(
                        f"example {index} of {self._name} has the label {label}, which is not one "
                        f"of the {len(self.class_names)} classes; choose a labelled split"
                    )
        return np.int32(example[self._label])


def open_tfds(name: str, dataset: str, split: str, data_dir: str) -> TfdsSource:
    """Opens a split; the data set is prepared first if it is one of `EMBEDDED`."""
    import tensorflow_datasets as tfds

    import resnet_flax.data.digits  # noqa: F401  registers the builder
    from resnet_flax.data.sources.tfds_features import check_features

    builder = _builder(dataset, data_dir)
    if not builder.info.splits and dataset in EMBEDDED:
        prepare(dataset, data_dir)
        builder = _builder(dataset, data_dir)
    if not builder.info.splits:
        _check_whole(dataset, data_dir, Path(builder.data_dir))
        raise SettingError(
            f"{name} is not prepared in {builder.data_dir}; prepare it with "
            f"`resnet-flax data prepare {name}`, or give its directory as",
            "data.data_dir",
        )
    features = builder.info.features
    labels = SEVERAL_LABELS.get(dataset.partition("/")[0].partition(":")[0], ("label", "", {}))
    check_features(name, features, labels[0])
    # Decoded here: TFDS uses OpenCV if it is installed, else Pillow.
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        examples = builder.as_data_source(split=split, decoders=decoders)
        source = TfdsSource(
            name,
            examples,
            tuple(features[labels[0]].names),
            features["image"].shape[-1],
            labels[:2],
            labels[2].get(split) if labels[1] else len(examples),
            _version(builder),
            _files(builder, split),
            _remedy(dataset, data_dir, builder.data_dir),
        )
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(_wrong_split(name, split, tuple(builder.info.splits))) from error
    source.check_labels()
    return source


# One split, or several with + between them, each with or without a slice in examples or percent.
_PART = r"\s*[\w.-]+(\[(-?\d+|-?[\d.]+%)?:(-?\d+|-?[\d.]+%)?\])?\s*"
_SPLIT = re.compile(rf"{_PART}(\+{_PART})*")


def _wrong_split(name: str, split: str, known: tuple[str, ...]) -> str:
    """Why a split that TFDS refuses cannot be used."""
    if not _SPLIT.fullmatch(split):
        return f"the split {split!r} is malformed; expected such as {known[-1]}[:10]"
    names = [part.partition("[")[0].strip() for part in split.split("+")]
    if all(one in known for one in names):
        return f"the split {split!r} of {name} is empty; give one with examples"
    return f"{name} has no split {split!r} (it has {', '.join(known)})"


def _version(builder: Any) -> str:
    """The data set's name and version."""
    config = builder.builder_config.name if builder.builder_config else ""
    return "/".join(filter(None, (builder.name, config, str(builder.version))))


def _files(builder: Any, split: str) -> list[Path]:
    """The files of a split, or of several."""
    return [
        Path(file)
        for name, info in builder.info.splits.items()
        if name in re.findall(r"\w+", split) or split == "all"
        for file in info.filepaths
    ]


def _builder(dataset: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return _array_record(tfds.builder(dataset, data_dir=data_dir or None))
    except tfds.core.registered.DatasetNotFoundError as error:
        near = closest(dataset, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"TFDS has no data set called {dataset!r}{near}") from error
    except UserError:
        raise
    except Exception as error:  # errors of many types: names, versions, damaged files
        remedy = "".join(
            f"; {_remedy(dataset, data_dir, path.parent)}"
            for path in _descriptions(dataset, data_dir)
            if storage.read_json(path) is None
        )
        raise UserError(f"TFDS cannot open {dataset!r}: {first_line(error)}{remedy}") from error


def _remedy(dataset: str, data_dir: str, directory: Any) -> str:
    """What repairs a damaged data set: TFDS prepares nothing where its directory exists."""
    there = f" --data_dir={data_dir}" if data_dir else ""
    return f"remove {directory} and run `resnet-flax data prepare tfds:{dataset}{there}`"


def _descriptions(dataset: str, data_dir: str) -> list[Path]:
    """The files that TFDS describes the versions and configs of a prepared data set with."""
    import tensorflow_datasets as tfds

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    return sorted((root / re.split("[/:]", dataset)[0]).rglob("dataset_info.json"))


def _check_whole(dataset: str, data_dir: str, directory: Path) -> None:
    """Raises UserError if the directory of a data set is there without its description."""
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory} has files but no dataset_info.json, so the data set in it is not "
            f"complete; {_remedy(dataset, data_dir, directory)}"
        )


def _array_record(builder: Any) -> Any:
    """A builder that reads and writes array_record, which is not TFDS's default."""
    import tensorflow_datasets as tfds

    wanted = tfds.core.file_adapters.FileFormat.ARRAY_RECORD
    if builder.info.splits and builder.info.file_format != wanted:
        there = builder.data_dir
        raise SettingError(
            f"{there} is prepared as {builder.info.file_format.value}, which has no "
            "random access; convert it with `python -m tensorflow_datasets.scripts.convert_format "
            f"--dataset_version_dir={there} --out_file_format=array_record "
            "--out_dir=DIR/NAME/VERSION` and give DIR as",
            "data.data_dir",
        )
    if not builder.info.splits:
        builder.info.set_file_format(wanted, override=True)
    return builder


def _lacks_tensorflow(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that of a missing module."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def tfds_splits(dataset: str, data_dir: str) -> tuple[str, ...]:
    """The names of a data set's splits; none if it is not prepared."""
    import resnet_flax.data.digits  # noqa: F401  registers the builder

    return tuple(_builder(dataset, data_dir).info.splits)


def prepare(dataset: str, data_dir: str = "") -> str:
    """Downloads and prepares a TFDS data set, unless another process does or already has.

    Returns:
      Its directory.

    Raises:
      UserError: there is no such data set, or it cannot be downloaded or written.
    """
    import tensorflow_datasets as tfds

    import resnet_flax.data.digits  # noqa: F401  registers the builder

    builder = _builder(dataset, data_dir)
    if not builder.info.splits:
        _check_whole(dataset, data_dir, Path(builder.data_dir))
        say(f"preparing {dataset} in {builder.data_dir}")
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Unknown size (download: Unknown ..."
            builder.download_and_prepare()
    except Exception as error:  # errors of many types: disk, network, missing TensorFlow
        builder = _builder(dataset, data_dir)
        if not builder.info.splits:  # else another process prepared it first
            reason = getattr(error, "strerror", None) or first_line(error)
            said = f"cannot prepare {dataset} in {builder.data_dir}: {reason};"
            if isinstance(error, OSError) and not _lacks_tensorflow(error):
                said += " give a directory that can be written as"
                raise SettingError(said, "data.data_dir") from error
            hint = (
                "it needs TensorFlow: pip install 'resnet_flax[prepare]'"
                if _lacks_tensorflow(error)
                else "its page on tensorflow.org/datasets says what it needs"
            )
            raise UserError(f"{said} {hint}") from error
    return str(builder.data_dir)
