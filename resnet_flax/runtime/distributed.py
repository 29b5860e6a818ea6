"""Multiple processes, one per host, on JAX's multi-controller runtime.

Every process runs the same program on its part of the data; only the first one writes files and
prints.
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.runtime import heartbeat, launchers, storage
from resnet_flax.runtime.heartbeat import Heartbeat
from resnet_flax.runtime.relay import Relay, relayed
from resnet_flax.runtime.terminal import say

# Seconds after which JAX's own heartbeat ends all processes with a C++ stack trace. It is the last
# resort, and counts time in which the job was suspended.
JAX_HEARTBEAT = 24 * 3600


def start(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    seconds: int = 300,
    heartbeat_seconds: int = 30,
) -> Heartbeat | None:
    """Connects to the other processes, if any; must be called before anything else uses JAX.

    Args:
      coordinator: HOST:PORT of the first process; empty if a launcher tells it (see `launchers`).
      num_processes: number of processes; 0 for the launcher's.
      process_id: index of this process, from 0; -1 for the launcher's.
      seconds: to wait for the others. After that an error is printed and the process exits with 2,
        as the wait cannot be interrupted.
      heartbeat_seconds: after which a process from which nothing was heard is lost, and the others
        end.

    Returns:
      The heartbeat, to which this process says when it ends; None for one process, or if there is
      no connection for it.

    Raises:
      UserError: only some of the three are given, or they are inconsistent, or the launcher does
        not tell where the first process is.
    """
    place = launchers.find()
    if place and coordinator and place.size and num_processes <= 0 and process_id < 0:
        num_processes, process_id = place.size, place.rank
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    # Left to JAX, each process that SLURM or Open MPI starts would use one device.
    devices = launchers.devices_of(place, launchers.visible_gpus()) if place else ()
    own: dict[str, Any] = {"local_device_ids": list(devices)}
    if place and place.launcher == "Cloud TPU":
        own = {}
    if not any(given):
        if place is None:
            return None
        if not place.connects:
            raise UserError(
                f"{place.launcher} started this process as number {place.rank} of {place.size}, "
                "but does not tell where number 0 is; add --coordinator=HOST:PORT, its host and a "
                "free port there (localhost if all are on one host)"
            )
        who = f"{place.launcher} started this process as one of several, but they"
    elif all(given):
        _check(coordinator, num_processes, process_id)
        who = f"the coordinator {coordinator}" if process_id else f"the {num_processes} processes"
        own |= {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    else:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together; give all three, or "
            "none if SLURM, Open MPI, Kubernetes or Cloud TPU starts the processes"
        )
    connected = _initialize(who, seconds, heartbeat_seconds, **own)
    if place:
        gpus = jax.local_device_count() if jax.default_backend() == "gpu" else 0
        for warning in launchers.warnings(place, gpus):
            say(warning, sys.stderr)
    return connected


def refuse_several(what: str) -> None:
    """Raises UserError if a launcher has started this as one of several processes.

    Args:
      what: runs in one process, such as 'sweep'.
    """
    place = launchers.find()
    if place and place.size:
        raise UserError(
            f"{place.launcher} started {what} as {place.size} processes, but it runs in one; start "
            "it once (of the commands, resnet-flax train and eval run in several)"
        )


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator must be the first process's HOST:PORT, not {coordinator!r}")
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} must be less than --num_processes={num_processes}"
        )


def _initialize(
    who: str, seconds: int, heartbeat_seconds: int, **settings: Any
) -> Heartbeat | None:
    def give_up() -> None:
        say(
            f"error: {who} did not answer within {seconds} s; start all processes with the same "
            "--coordinator and --num_processes, and check that they can reach its port",
            sys.stderr,
        )
        os._exit(2)

    # JAX's own timeout aborts with a C++ stack trace; this one comes first.
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    # Otherwise JAX would take SIGTERM from `runtime.signals`, which stops all at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with relayed() as relay:
            jax.distributed.initialize(
                **settings,
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=JAX_HEARTBEAT,
            )
    finally:
        timer.cancel()
    return _heartbeat(relay, heartbeat_seconds) if jax.process_count() > 1 else None


def _heartbeat(relay: Relay, seconds: int) -> Heartbeat | None:
    """Connects the processes for their heartbeat; a collective."""
    record: dict[str, Any] = {"host": socket.gethostname(), "seconds": seconds}
    with contextlib.ExitStack() as stack:
        if is_primary():
            listener = stack.enter_context(heartbeat.listen())
            record["port"] = listener.getsockname()[1]
            record["token"] = secrets.token_hex(16)
            record["addresses"] = heartbeat.addresses()
        text = np.frombuffer(json.dumps(record).encode().ljust(2000), np.uint8)
        records = [json.loads(row.tobytes()) for row in _gather(text)]
        hosts = [record["host"] for record in records]
        port, token = records[0]["port"], records[0]["token"]
        if is_primary():
            connections = heartbeat.accept(listener, token, len(hosts) - 1)
            missing = [i for i in range(1, len(hosts)) if i not in connections]
            if missing:
                say(
                    f"note: process {', '.join(map(str, missing))} could not connect to port "
                    f"{port} of {hosts[0]} for its heartbeat; if it is lost, the others may wait "
                    "for it for a day",
                    sys.stderr,
                )
        else:
            candidates = [relay.coordinator.rpartition(":")[0], *records[0]["addresses"]]
            connections = heartbeat.connect(candidates, port, token, jax.process_index())
            relay.hold = bool(connections)
    if not connections:
        return None
    limit = float(max(record["seconds"] for record in records))
    return Heartbeat(jax.process_index(), hosts, connections, limit)


def is_primary() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def all_max(number: int) -> int:
    """The maximum over all processes; a collective, which all must call in the same order."""
    return number if jax.process_count() == 1 else int(_gather(np.array(number)).max())


def all_sum(numbers: np.ndarray) -> np.ndarray:
    """The sums over all processes of each number; a collective like `all_max`."""
    if jax.process_count() == 1:
        return numbers
    return _gather(numbers).reshape(jax.process_count(), -1).sum(0)


def of_the_first(number: int) -> int:
    """The number that the first process has, 0 or more; a collective like `all_max`."""
    return all_max(number if is_primary() else -1)


def barrier() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        _gather(np.array(0))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A context that fails in all processes if it fails in one, which has no collective inside.

    Otherwise the others would wait for the one that failed, at the next collective.

    Args:
      what: what failed, as "another process ..." is said to have done.

    Raises:
      UserError: it failed in another process. Where it failed, the error itself is raised.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    if all_max(int(failed is not None)):
        raise failed or UserError(f"another process {what}; see its error")


def assert_shared(directory: Path, seconds: float = 60.0) -> None:
    """Raises UserError in every process unless all see what the first writes into a directory.

    Args:
      directory: exists for the first process.
      seconds: to wait; on NFS another host may not see a new file at once.
    """
    if jax.process_count() == 1:
        return
    path, token = directory / ".shared", secrets.token_bytes(8)
    if is_primary():
        storage.write(path, token)
    first = _gather(np.frombuffer(token, np.int32)).reshape(jax.process_count(), -1)[0].tobytes()
    deadline = time.monotonic() + seconds
    while not (seen := _content(path) == first) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [i for i, row in enumerate(_gather(np.array(int(seen))).ravel()) if not row]
    if is_primary():
        storage.remove(path)
    if blind:
        raise UserError(
            f"process {', '.join(map(str, blind))} of {jax.process_count()} does not see what "
            f"process 0 writes into {directory.absolute()}; give a --workdir on a file system that "
            "all hosts share"
        )


def _content(path: Path) -> bytes | None:
    try:
        return storage.read(path)
    except OSError:
        return None


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
