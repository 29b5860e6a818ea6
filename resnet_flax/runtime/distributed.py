"""Multiple processes, one per host, on JAX's multi-controller runtime.

Every process runs the same program on its part of the data; only the first one writes files and
prints.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from resnet_flax.errors import UserError


def launcher(environment: Mapping[str, str] = os.environ) -> str:
    """The launcher that started this process as one of several, by its environment; else empty."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or number("MEGASCALE_NUM_SLICES") > 1:
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return ""


def start(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, seconds: int = 300
) -> None:
    """Connects to the other processes, if any; must be called before anything else uses JAX.

    Args:
      coordinator: HOST:PORT of the first process; empty if a launcher sets it (see `launcher`).
      num_processes: number of processes.
      process_id: index of this process, from 0.
      seconds: to wait for the others. After that an error is printed and the process exits with 2,
        as the wait cannot be interrupted.

    Raises:
      UserError: only some of the three are given, or they are inconsistent.
    """
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if not any(given):
        found = launcher()
        if found:
            _initialize(f"{found} started this process as one of several, but they", seconds)
        return
    if not all(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together; give all three, or "
            "none if SLURM, Open MPI, Kubernetes or Cloud TPU starts the processes"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator must be the first process's HOST:PORT, not {coordinator!r}")
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} must be less than --num_processes={num_processes}"
        )
    who = f"the {num_processes} processes" if process_id == 0 else f"the coordinator {coordinator}"
    _initialize(
        who,
        seconds,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
    )


def _initialize(who: str, seconds: int, **settings: Any) -> None:
    def give_up() -> None:
        print(
            f"error: {who} did not answer within {seconds} s; start all processes with the same "
            "--coordinator and --num_processes, and check that they can reach its port",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    # JAX's own timeout aborts with a C++ stack trace; this one comes first.
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    # Otherwise JAX would take SIGTERM from `runtime.signals`, which stops all at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**settings, initialization_timeout=seconds + 60)
    finally:
        timer.cancel()


def is_primary() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def all_max(number: int) -> int:
    """The maximum over all processes; a collective, which all must call in the same order."""
    return number if jax.process_count() == 1 else int(_gather(np.array(number)).max())


def barrier() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        _gather(np.array(0))


def assert_same_on_all(
    values: Mapping[str, Any],
    besides: tuple[str, ...] = (),
    what: str = "config",
    compare: str = "what --print_config says",
) -> None:
    """Raises UserError in every process unless all have the same values.

    Args:
      values: JSON.
      besides: keys that may differ.
      what: name of the values.
      compare: what the user can compare to see the difference.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps({k: v for k, v in values.items() if k not in besides}, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.int32)
    digests = _gather(digest).reshape(jax.process_count(), -1)
    other = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if other:
        raise UserError(
            f"process {', '.join(map(str, other))} of {jax.process_count()} was started with "
            f"another {what} than process 0 (compare {compare} on each); start all with the same"
        )


def _gather(array: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    gather: Callable[..., Any] = multihost_utils.process_allgather
    return np.asarray(gather(array))
