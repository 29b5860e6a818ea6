"""Launchers, which start a program as several processes; known by the environment they set."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DEVICES = Path("/dev")
# Variables that limit which GPUs a process sees.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Place(NamedTuple):
    """The place of this process among those that a launcher started.

    Attributes:
      launcher: its name.
      size: number of processes; 0 if only JAX finds that out.
      rank: number of this process.
      local_size: number of processes on this host; 0 if unknown.
      local_rank: number of this process among them.
      connects: whether JAX can find the first process's address by itself.
      gpus: number of GPUs on this host that the launcher gave to the job; 0 if unknown.
    """

    launcher: str
    size: int = 0
    rank: int = 0
    local_size: int = 0
    local_rank: int = 0
    connects: bool = True
    gpus: int = 0


def find(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where a launcher has put this process; None if it was not started as one of several."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else 0

    if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        on_each = _of_slurm(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = number("SLURM_NODEID")
        return Place(
            "SLURM",
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_PROCID"),
            on_each[node] if node < len(on_each) else 0,
            number("SLURM_LOCALID"),
            gpus=number("SLURM_GPUS_ON_NODE"),
        )
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return Place(
            "Open MPI",
            number("OMPI_COMM_WORLD_SIZE"),
            number("OMPI_COMM_WORLD_RANK"),
            number("OMPI_COMM_WORLD_LOCAL_SIZE"),
            number("OMPI_COMM_WORLD_LOCAL_RANK"),
            "OMPI_MCA_orte_hnp_uri" in environment,  # not from version 5 on
        )
    if number("PMI_SIZE") > 1:
        return Place(
            "mpiexec",  # MPICH's, Intel's and others'
            number("PMI_SIZE"),
            number("PMI_RANK"),
            number("MPI_LOCALNRANKS"),
            number("MPI_LOCALRANKID"),
            False,
        )
    if number("WORLD_SIZE") > 1 and "TORCHELASTIC_RUN_ID" in environment:
        return Place(
            "torchrun",
            number("WORLD_SIZE"),
            number("RANK"),
            number("LOCAL_WORLD_SIZE"),
            number("LOCAL_RANK"),
            False,
        )
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or number("MEGASCALE_NUM_SLICES") > 1:
        return Place("Cloud TPU")
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Place("Kubernetes")
    return None


def devices_of(place: Place, visible: int) -> Sequence[int]:
    """The GPUs that a process uses, of those that it sees; empty for all.

    A process that is alone on its host takes all of them. Several on a host share them equally, or
    each takes all that it sees, if the launcher lets each see its own only.

    Args:
      place: of the process.
      visible: number of GPUs that it sees.
    """
    share = visible // max(place.local_size, 1)
    if place.local_size < 2 or not share:
        return ()
    return range(place.local_rank * share, (place.local_rank + 1) * share)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of GPUs that this process sees."""
    for name in _VISIBLE:
        if name in environment:
            # -1 and NoDevFiles stand for none.
            found = [part.strip() for part in environment[name].split(",")]
            return sum(part not in ("", "-1", "NoDevFiles") for part in found)
    return len(list(DEVICES.glob("nvidia[0-9]*")))


def warnings(place: Place, gpus: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the user should know of how a launcher started the processes.

    Args:
      place: of this process.
      gpus: number of GPUs that it uses.
      environment: of this process.
    """
    found, here = [], max(place.local_size, 1)
    if place.gpus and gpus and gpus * here != place.gpus:
        found.append(
            f"warning: {place.launcher} gave this host {place.gpus} GPUs, but its processes "
            f"({here}) use {gpus * here}"
        )
    # mpirun exports what it is given by --mca.
    patience = environment.get("OMPI_MCA_odls_base_sigkill_timeout", "1")
    if place.launcher == "Open MPI" and place.rank == 0 and patience in ("0", "1"):
        found.append(
            "note: mpirun kills its processes one second after a SIGTERM, which may be before the "
            "state is saved; start it with --mca odls_base_sigkill_timeout 60"
        )
    return found


def _of_slurm(text: str) -> list[int]:
    """The numbers in SLURM's notation, such as '2(x3),1' for 2, 2, 2, 1."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found
