"""Allocation of large buffers: a program's first line re-executes it with another allocator."""

import contextlib
import os
import sys
from importlib import metadata
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DEVICES = Path("/dev")
# In this order, as the second depends on the first.
LIBRARIES = ("libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2")
# Bytes; buffers from this size on are kept until the program ends. TBB's minimum.
KEPT = 8 * 2**20
THRESHOLD = "TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD"


def reexec(keep: bool = False) -> None:
    """Re-executes this program with a faster allocation of large buffers; for its first line.

    glibc returns every large buffer to the kernel when it is freed and gets it back page by page in
    the next step, which takes a quarter of a training step or more on a CPU (docs/decisions.md).
    The allocator and its settings are fixed when a program starts, hence the re-execution. If the
    environment already sets them, nothing happens.

    Args:
      keep: see `settings`.
    """
    preloaded = os.environ.get("LD_PRELOAD")
    if preloaded and preloaded == _libraries():
        del os.environ["LD_PRELOAD"]  # git and reader processes do not need it
    changes = settings(keep)
    if not changes or not _is_the_program():
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None if it was closed
            stream.flush()
    # If re-execution fails, the program continues as it is.
    with contextlib.suppress(OSError):
        environment = {**os.environ, **changes}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def settings(keep: bool) -> dict[str, str]:
    """Environment variables for a program that starts; empty if nothing can be gained.

    Args:
      keep: TBB's allocator keeps large buffers, to reuse them for allocations of the same size.
        Otherwise, or without that allocator or with a device other than a CPU, they are freed and
        use huge pages. For programs with few sizes, such as training: a kept buffer cannot be used
        for another size.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or THRESHOLD in os.environ:
        return {}
    chosen = {}
    if _on_demand():
        chosen["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    if keep and not os.environ.get("LD_PRELOAD") and not _accelerators():
        libraries = _libraries()
        chosen |= {"LD_PRELOAD": libraries, THRESHOLD: str(KEPT)} if libraries else {}
    return chosen


def _libraries() -> str:
    """TBB's libraries in the form of LD_PRELOAD; empty if they are not installed."""
    try:
        files = metadata.distribution("tbb").files or []
    except metadata.PackageNotFoundError:
        return ""
    found = {file.name: os.path.realpath(file.locate()) for file in files}
    paths = [found.get(name, "") for name in LIBRARIES]
    # LD_PRELOAD cannot have paths with a space or a colon.
    whole = all(os.path.exists(path) and not set(path) & {" ", ":"} for path in paths)
    return ":".join(paths) if whole and sys.platform == "linux" else ""


def _accelerators() -> bool:
    """Whether arrays may be in the memory of an accelerator."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    patterns = ("nvidia[0-9]*", "dxg", "kfd", "accel*", "vfio/[0-9]*")
    return any(any(DEVICES.glob(pattern)) for pattern in patterns)


def _is_the_program() -> bool:
    """Whether the interpreter was started to run the calling program with these arguments.

    Not if a notebook, a debugger or another script calls it, which would be re-executed.
    """
    arguments = sys.argv[1:]
    started, given = sys.orig_argv[: len(sys.orig_argv) - len(arguments)], sys.orig_argv
    if not sys.executable or sys.gettrace() or given[len(started) :] != arguments:
        return False
    return started[-1:] == sys.argv[:1] or started[-2:] == ["-m", "resnet_flax"]


def _on_demand() -> bool:
    try:
        return "[madvise]" in THP.read_text()
    except OSError:
        return False
