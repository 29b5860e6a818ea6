"""The training that faults.py disturbs, its run without faults, and comparisons with that."""

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from faults_float64 import EXAMPLES
from faults_session import Session, Typical, Unmet, expect

from resnet_flax.runtime.storage import read_json
from resnet_flax.training.checkpoint_files import DamagedError, read_meta, read_variables, steps_in
from resnet_flax.training.writers import read_metrics

ROOT = Path(__file__).parent.parent
STEPS, BATCH, EVAL_EVERY, LOG_EVERY = 120, 8, 20, 3
FLAGS = (
    "--config.model.name=cifar_resnet8",
    "--config.model.overrides=stage_sizes=1,1 stage_features=4,8 stem_features=4",
    f"--config.steps={STEPS}",
    f"--config.batch_size={BATCH}",
    "--config.optim.warmup_steps=10",
    f"--config.eval.every={EVAL_EVERY}",
    "--config.data.eval_batch_size=40",
    f"--config.log.every={LOG_EVERY}",
    "--config.log.tensorboard=false",
)
EVERY = "--config.checkpoint.every=5"
# What may differ between two equal runs.
TIMES = ("images_per_second", "data_wait")
MEASURES = ("split", "step", "error", "errors", "count", "loss")
# Of each leaf's norm, where a run was continued on other devices.
TOLERANCE = 1e-8
# oneDNN off: its programs are not cached. Devices that share a busy processor may be late.
XLA_FLAGS = (
    "--xla_cpu_experimental_onednn_custom_call=false "
    "--xla_cpu_collective_call_terminate_timeout_seconds=500"
)
Records = dict[tuple[str, int], dict[str, Any]]


@dataclasses.dataclass
class Devices:
    """What a session is started on.

    Attributes:
      devices: of each process.
      processes: their number.
    """

    devices: int = 1
    processes: int = 1


@dataclasses.dataclass
class Reference:
    """The run without faults.

    Attributes:
      digests: of every leaf, by step; empty in float64.
      variables: parameters and running statistics by step, in float64 only.
      records: of metrics.jsonl.
      result: of result.json.
      examples: the numbers of each step's examples, in float64 only.
    """

    digests: dict[int, dict[str, int]]
    variables: dict[int, Any]
    records: Records
    result: dict[str, Any]
    examples: dict[int, list[int]]


class Training:
    """A training in float32, whose bits are compared, or in float64, on devices that change.

    Args:
      root: an existing directory for data and compiled programs.
      scratch: an existing directory for the run without faults.
      float64: which of the two.
    """

    def __init__(self, root: Path, scratch: Path, float64: bool) -> None:
        self.root, self.scratch, self.float64 = root, scratch, float64
        self.typical = Typical(STEPS, EVAL_EVERY, LOG_EVERY)
        self.reference = Reference({}, {}, {}, {}, {})

    def session(
        self, workdir: Path, flags: Sequence[str] = (EVERY,), on: Devices | None = None
    ) -> Session:
        """Starts the command."""
        on = on or Devices()
        program = "benchmarks/faults_float64.py" if self.float64 else "train.py"
        command = [sys.executable, program, *FLAGS, f"--workdir={workdir}"]
        command += [f"--config.data.data_dir={self.root / 'data'}", *flags]
        commands = [command]
        if on.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={on.processes}"]
            commands = [[*command, *place, f"--process_id={i}"] for i in range(on.processes)]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count={on.devices}",
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
            EXAMPLES: str(examples_of(workdir)),
        }
        return Session(commands, environment, ROOT)

    def measure(self) -> None:
        """Trains without faults, and keeps what other runs are compared with."""
        workdir = self.scratch / ("float64" if self.float64 else "float32")
        flags = ("--config.checkpoint.every=1", f"--config.checkpoint.keep={STEPS}")
        session = self.session(workdir, flags)
        try:
            (status,) = session.end(600)
        finally:
            session.kill()
        expect(status == 0, f"the run without faults ended with {status}: {session.errors[0]}")
        steps = steps_in(workdir / "checkpoints")
        expect(len(steps) == STEPS, f"the run without faults saved {len(steps)} checkpoints")
        reference = self.reference
        for step in steps:
            path = workdir / "checkpoints" / str(step)
            if self.float64:
                reference.variables[step] = variables_of(path)
            else:
                reference.digests[step] = read_meta(path)["digests"]
        reference.records = records_of(workdir / "metrics.jsonl")
        reference.result = result_of(workdir)
        if self.float64:
            for step, parts in examples(workdir).items():
                (((_, number), (ids,)),) = ((part, tuple(taken)) for part, taken in parts.items())
                expect(number == BATCH, f"the run without faults took {number} examples")
                reference.examples[step] = list(ids)

    def same_state(self, path: Path) -> None:
        """Raises Unmet if a checkpoint is not that of the run without faults."""
        step = int(path.name)
        try:
            if not self.float64:
                found, expected = read_meta(path)["digests"], self.reference.digests[step]
                other = [leaf for leaf in expected if found.get(leaf) != expected[leaf]]
                expect(found.keys() == expected.keys(), f"step {step} has other leaves")
                expect(not other, f"step {step}: {len(other)} leaves have other bits: {other[:3]}")
                return
            distance = largest_distance(variables_of(path), self.reference.variables[step])
        except DamagedError as error:
            raise Unmet(f"the checkpoint of step {step} is damaged: {error}") from error
        expect(
            distance <= TOLERANCE,
            f"step {step}: parameters differ by {distance:.1e} of a leaf's norm",
        )

    def same_examples(self, workdir: Path) -> None:
        """Raises Unmet unless every step had the examples of the run without faults."""
        found = examples(workdir)
        for step, expected in self.reference.examples.items():
            parts = found.get(step, {})
            for (first, number), taken in parts.items():
                same = taken == {tuple(expected[first : first + number])}
                expect(same, f"step {step} had other examples: {taken}")
            numbers = {number for _, number in parts}
            whole = any(
                all((first, number) in parts for first in range(0, BATCH, number))
                for number in numbers
            )
            expect(whole, f"not all examples of step {step} were taken")

    def same(self, found: Any, expected: Any, what: str) -> None:
        """Raises Unmet if a record or a result is not that of the run without faults."""
        equal = found == expected
        if self.float64 and isinstance(expected, dict):
            equal = found.keys() == expected.keys() and all(
                close(found[name], expected[name]) for name in found
            )
        expect(equal, f"{what} is {found}, not {expected}")


def close(found: Any, expected: Any) -> bool:
    """Whether two values of a record are equal up to rounding."""
    if isinstance(expected, float):
        return abs(found - expected) <= TOLERANCE * max(1.0, abs(expected))
    return found == expected


def variables_of(path: Path) -> Any:
    """Parameters and running statistics of a checkpoint, verified."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, read_variables(path, read_meta(path)))


def largest_distance(tree: Any, other: Any) -> float:
    """The largest difference of two leaves, relative to the norm of the second."""
    expect(jax.tree.structure(tree) == jax.tree.structure(other), "there are other leaves")
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs)


def records_of(path: Path) -> Records:
    """The records of a metrics.jsonl without what differs between equal runs."""
    found: Records = {}
    for record in read_metrics(path):
        key = record["split"], record["step"]
        expect(key not in found, f"metrics.jsonl has two records of {key}")
        found[key] = {name: value for name, value in record.items() if name not in TIMES}
    return found


def result_of(workdir: Path) -> dict[str, Any]:
    """What result.json says of the network."""
    result = read_json(workdir / "result.json")
    expect(result is not None, "result.json cannot be read")
    return {name: result.get(name) for name in MEASURES}


def examples_of(workdir: Path) -> Path:
    """Where the numbers of a run's examples are noted."""
    return workdir.with_name(f"{workdir.name}.examples")


def examples(workdir: Path) -> dict[int, dict[tuple[int, int], set[tuple[int, ...]]]]:
    """The examples that were taken: by step, and by (first, number) of a process's part."""
    found: dict[int, dict[tuple[int, int], set[tuple[int, ...]]]] = {}
    for line in examples_of(workdir).read_text().splitlines():
        noted = json.loads(line)
        number = len(noted["ids"])
        part = noted["process"] * number, number
        found.setdefault(noted["step"], {}).setdefault(part, set()).add(tuple(noted["ids"]))
    return found
