"""Where weights are: what a name, a file or a directory stands for."""

from pathlib import Path

from resnet_flax.errors import SettingError, UserError, closest
from resnet_flax.models import VARIANTS
from resnet_flax.runtime import storage
from resnet_flax.training.checkpoint_files import newest
from resnet_flax.weights import hub
from resnet_flax.weights.catalog import CATALOG, fetch
from resnet_flax.weights.files import INDEX

# Files of a run and of evaluations, which are often given in place of what has the weights.
_NO_WEIGHTS = (".json", ".jsonl", ".gz", ".png", ".csv")


def split(name: str) -> tuple[Path, str]:
    """The file or directory of PATH or PATH:ADDRESS, and the address of a network in it.

    Raises:
      UserError: the machine cannot look for such a path, such as a far too long one.
    """
    path = Path(name)
    file, colon, after = name.rpartition(":")
    try:
        if colon and after and not storage.exists(path) and storage.exists(Path(file)):
            return Path(file), after
        storage.exists(path)
    except OSError as error:
        raise UserError(f"{name[:80]} cannot be read: {error.strerror}") from error
    return path, ""


def path_of(name: str) -> tuple[Path, str]:
    """The file of published weights, downloaded if needed, or the file that a name says.

    Returns:
      The file, and the address of the network in it; see `split`.
    """
    if name in CATALOG:
        return fetch(name), ""
    path, address = split(name)
    if name and storage.is_directory(path):
        weights = hub.weights_in(path)
        if weights is None:
            near = _runs_near(path)
            if near:
                raise UserError(f"{name} has no checkpoints; give {near}")
            raise UserError(
                f"{name} has neither checkpoints nor weights of the Hugging Face hub; give the "
                "workdir of a run, or a weights file"
            )
        return weights, address
    if name and storage.exists(path):
        is_other = path.suffix.lower() in _NO_WEIGHTS and not path.name.endswith(INDEX)
        if is_other and (near := _runs_near(path)):  # reading it says what else it is
            raise UserError(f"{name} is not a weights file; give {near}")
        return path, address
    unknown = f"{name or repr(name)} is not a file, a workdir or the name of published weights"
    if name in VARIANTS:
        others = [known for known in CATALOG if known.partition(".")[0] == name]
        hint = f" use one of {', '.join(others)}, or" if others else ""
        raise SettingError(
            f"{unknown}, but a network without weights;{hint} give a file of them as", "weights"
        )
    near = closest(name, [*CATALOG, *VARIANTS])
    raise UserError(
        f"{unknown}{near}{' (' if near else '; '}resnet-flax models --published lists them"
        f"{')' * bool(near)}"
    )


def _runs_near(path: Path) -> str:
    """The runs that a path is in or has in it, in words; empty if there are none."""
    for outer in list(path.parents)[:3]:
        if is_checkpoint(outer):
            return f"{outer}, which it is part of"
    inner = [path / name for name in storage.names(path)] if storage.is_directory(path) else []
    inner += [one / name for one in inner[:100] for name in storage.names(one)]
    runs = [str(one) for one in inner if is_checkpoint(one)]
    return f"one of the runs in it, such as {', '.join(runs[:3])}" if runs else ""


def check_without_weights(name: str, weights: str) -> None:
    """Raises UserError where what should be the name of a network is something with weights."""
    path = Path(name)
    for kind, fits in (
        ("the name of published weights", name in CATALOG and weights in CATALOG),
        ("a workdir or checkpoint", is_checkpoint(path)),
        ("a file", name not in VARIANTS and storage.is_file(path)),
    ):
        if fits:
            raise SettingError(f"{name} is {kind} and has weights; leave out", "weights")


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint of this package, or the workdir of a run."""
    return storage.is_directory(path / "meta") or storage.is_directory(path / "checkpoints")


def checkpoint(path: Path) -> Path:
    """The newest checkpoint of a workdir, or the one that `path` is."""
    return path if storage.is_directory(path / "meta") else newest(path / "checkpoints")
