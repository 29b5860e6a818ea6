"""Large buffers in huge pages."""

import contextlib
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def with_huge_pages() -> None:
    """Starts this program anew, its large buffers in huge pages; for a program's first line.

    glibc gives every large buffer back to the kernel when it is freed and gets it again, page by
    page, in the next step: on a CPU a quarter of a training step and more (docs/decisions.md).
    Asking for huge pages makes that 512 times fewer, but glibc hears of it only when a program
    starts. Nothing happens where that has been done already, where GLIBC_TUNABLES speaks of it,
    or where the kernel has no huge pages to give on demand.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or not _on_demand() or not _is_the_program():
        return
    setting = f"{TUNABLE}=1"
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{setting}" if tunables else setting
    sys.stdout.flush()
    sys.stderr.flush()
    # A program that cannot be started so goes on as it is.
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_the_program() -> bool:
    """Whether the interpreter was started for what calls this, and with these arguments.

    Not where a notebook, a debugger or another script runs it: that would be started anew.
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
