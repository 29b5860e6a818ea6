"""How large buffers are allocated: a program's first line re-executes it with another allocator."""

import contextlib
import os
import sys
from importlib import metadata
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DEVICES = Path("/dev")
# In this order, as the second needs the first.
LIBRARIES = ("libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2")
# Bytes; such buffers and larger ones are kept until the program ends. The least that TBB takes.
KEPT = 8 * 2**20
THRESHOLD = "TBB_MALLOC_SET_HUGE_SIZE_THRESHOLD"


def reexec(keep: bool = False) -> None:
    """Re-executes this program so that its large buffers cost less; for a program's first line.

    glibc gives every large buffer back to the kernel when it is freed and gets it again, page by
    page, in the next step: on a CPU a quarter of a training step and more (docs/decisions.md).
    Which allocator there is and what it does is settled when a program starts. Nothing happens
    where the environment sets that already.

    Args:
      keep: as `settings` has it.
    """
    preloaded = os.environ.get("LD_PRELOAD")
    if preloaded and preloaded == _libraries():
        del os.environ["LD_PRELOAD"]  # git, and what reads images, need not have it
    changes = settings(keep)
    if not changes or not _is_the_program():
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is where it was closed
            stream.flush()
    # A program that cannot be started so goes on as it is.
    with contextlib.suppress(OSError):
        environment = {**os.environ, **changes}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def settings(keep: bool) -> dict[str, str]:
    """Environment variables for a program that starts; empty where there is nothing to be had.

    Args:
      keep: large buffers are kept, by TBB's allocator, for when one of the size is asked for
        again; else, or where that allocator or a CPU as the device is not there, they are given
        back and lie in huge pages. For programs that ask for few sizes, such as training: what is
        kept of one size serves no other.
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
    """TBB's, as LD_PRELOAD takes them; empty where they are not installed."""
    try:
        files = metadata.distribution("tbb").files or []
    except metadata.PackageNotFoundError:
        return ""
    found = {file.name: os.path.realpath(file.locate()) for file in files}
    paths = [found.get(name, "") for name in LIBRARIES]
    # A space or a colon would end a path there.
    whole = all(os.path.exists(path) and not set(path) & {" ", ":"} for path in paths)
    return ":".join(paths) if whole and sys.platform == "linux" else ""


def _accelerators() -> bool:
    """Whether arrays may lie elsewhere than in the host's memory."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    patterns = ("nvidia[0-9]*", "dxg", "kfd", "accel*", "vfio/[0-9]*")
    return any(any(DEVICES.glob(pattern)) for pattern in patterns)


def _is_the_program() -> bool:
    """Whether the interpreter was started for what calls this, and with these arguments.

    Not where a notebook, a debugger or another script runs it: that would be re-executed.
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
