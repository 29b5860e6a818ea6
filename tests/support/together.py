"""Several processes of one program on this machine, with Gloo collectives."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def free_port():
    """A port that nobody uses, and that no system gives to a program which takes any."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start(running, n, *arguments, devices=1, each=()):
    """Starts processes, and returns them.

    Args:
      running: a list that gets the processes, which must be killed at the end.
      n: their number; one alone gets no flags for several.
      arguments: of Python.
      devices: virtual devices of each.
      each: further arguments of each.
    """
    port = free_port()
    environment = dict(os.environ)
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    for i in range(n):
        place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={n}", f"--process_id={i}"]
        own = [*(place if n > 1 else []), *(each[i] if each else ())]
        running.append(
            subprocess.Popen(
                [sys.executable, *arguments, *own],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return running[-n:]


def ended(processes, status=0, seconds=300):
    """The output of each, once all have ended with `status`."""
    # At once: one whose pipe is full would wait until it is read, and others for it.
    with ThreadPoolExecutor(len(processes)) as pool:
        printed = list(pool.map(lambda one: one.communicate(timeout=seconds), processes))
    assert [process.returncode for process in processes] == [status] * len(processes), printed
    return printed


def kill(running):
    """Ends those that still run."""
    for process in running:
        process.kill()
        process.communicate()
