"""What each verb calls the settings that errors name: its own flags, see `errors.SettingError`.

A setting that a verb does not have here is called as in a config, which its `--config.KEY` sets.
"""

from collections.abc import Mapping

from resnet_flax.errors import SettingError

_DIRECTORY = {"data.data_dir": "--data_dir"}
_NO_FLAGS = {
    "memory of the host": "give the job more memory",
    "memory of the device": "use a device with more, or the host, by JAX_PLATFORMS=cpu",
}
_MODEL = {"variant": "--model", "weights": "--weights"}
_RUN = {"data.data_dir": "--config.data.data_dir", "data.source": "--config.data.source"}

WORDS: dict[str, dict[str, str]] = {
    "data": {**_NO_FLAGS, **_DIRECTORY},
    "eval": {
        **_MODEL,
        **_DIRECTORY,
        "data.source": "--data",
        "data.size": "pass --size=PIXELS, so that they get the same size",
        "data.crop_fraction": "pass --size and a --crop_fraction below 1, or another --protocol",
        "data.workers": "use fewer --workers, or none",
        "eval.metrics": "the others are computed if --metrics does not name it",
        "memory of the host": "use fewer --workers or a smaller --batch_size, or give the job more "
        "memory",
        "memory of the device": "pass a smaller --batch_size",
    },
    "export": {**_NO_FLAGS, **_MODEL},
    "models": _NO_FLAGS,
    "reproduce": {
        **_DIRECTORY,
        "data.source": "--config.data.source",
        "memory of the device": "pass a smaller --batch_size for evaluations; for training, "
        "--config.data.resident=false, --config.model.remat=1 or a smaller "
        "--config.data.eval_batch_size",
    },
    "summary": _NO_FLAGS,
    "sweep": _RUN,
    "train": _RUN,
}
# Of a further model, which has no flags of its own.
ENSEMBLE = {
    "variant": "--model of resnet-flax export FILE OUT.safetensors, and OUT.safetensors as "
    "--ensemble",
    "weights": "--ensemble",
}


def told(error: BaseException, words: Mapping[str, str]) -> str:
    """The sentence of an error in the words of a verb, or others."""
    return error.told(words) if isinstance(error, SettingError) else str(error)
