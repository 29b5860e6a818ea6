"""Faults of the machine that surface as errors of Python or JAX, as sentences for the user."""

import os
import re
import sys

from resnet_flax.errors import SettingError, UserError, first_line
from resnet_flax.runtime.storage import OF_THE_MACHINE

# What may be done about too little memory, without other results where the first ones are.
_LESS_DEVICE = (
    "in training, set data.resident=false, model.remat=1 or a smaller data.eval_batch_size, which "
    "a run may also be continued with, or begin with a smaller batch_size or more accumulation"
)
_LESS_HOST = (
    "use fewer data.workers, set data.in_memory and data.resident to false, use a smaller batch "
    "size, or give the job more memory"
)


def explained(error: BaseException, unnamed: str = "a file") -> UserError | None:
    """The sentence for an error that the machine causes; None for any other.

    Args:
      error: a full disk, memory that does not suffice, or a device that JAX does not find.
      unnamed: what the sentence calls a file that the error does not name.
    """
    if isinstance(error, OSError):
        if error.errno not in OF_THE_MACHINE:
            return None
        return UserError(f"{error.filename or unnamed} cannot be used: {error.strerror or error}")
    if isinstance(error, MemoryError):
        said = f" ({first_line(error)})" if str(error) else ""
        said = f"there is not enough memory on this host{said};"
        return SettingError(said, "memory of the host", _LESS_HOST)
    if lacks_memory(error):
        said = first_line(error).removeprefix("RESOURCE_EXHAUSTED: ")
        said = f"there is not enough memory on the device ({said});"
        return SettingError(said, "memory of the device", _LESS_DEVICE)
    if isinstance(error, RuntimeError | AssertionError):
        return _without_device()
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether JAX raised an error because the memory of a device did not suffice."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return re.search(r"RESOURCE_EXHAUSTED|out.of.memory", str(error), re.IGNORECASE) is not None


def _without_device() -> UserError | None:
    """The sentence for a JAX that has no device, whose errors have several types; else None."""
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        which = f" for JAX_PLATFORMS={wanted}" * bool(wanted)
        # What it adds is advice on that variable too.
        said = first_line(error).partition(" (set JAX_PLATFORMS")[0]
        said = f" ({said})" if str(error) else ""
        return UserError(
            f"JAX finds no device{which}{said}; unset JAX_PLATFORMS to use what there is, or set "
            "up the device and JAX for it: pip install 'jax[cuda12]', 'jax[cuda13]' or 'jax[tpu]'"
        )
    return None
