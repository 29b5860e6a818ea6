"""How a training step's cost grows with depth, batch, resolution and devices.

    python benchmarks/growth.py --figure=docs/growth.png

Each point is a process of its own. The points of an axis run at the same time and take their steps
alternately, so that a change in the machine's speed affects all of them. A point's cost is the
median of several steps, in seconds. The devices are virtual devices of one CPU, which share its
cores and one batch: that line should be flat, and its rise is the cost of splitting the batch and
communicating.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from resnet_flax.runtime import allocator

# Network, batch size, side of an image in pixels, devices. Along an axis only one of them changes.
AXES: dict[str, list[tuple[str, int, int, int]]] = {
    "depth": [(f"cifar_resnet{depth}", 32, 32, 1) for depth in (20, 32, 44, 56, 110)],
    "batch": [("cifar_resnet20", batch, 32, 1) for batch in (16, 32, 64, 128, 256)],
    "pixels": [("resnet18", 4, side, 1) for side in (64, 96, 128, 160, 192, 224)],
    "devices": [("cifar_resnet20", 128, 32, devices) for devices in (1, 2, 4, 8)],
}
TITLES = {
    "depth": "cifar_resnet*, batch 32",
    "batch": "cifar_resnet20",
    "pixels": "resnet18, batch 4",
    "devices": "cifar_resnet20, batch 128, two cores",
}
OUT = Path(__file__).parent.parent / "results" / "growth.json"


def work(network: str, batch: int, side: int) -> None:
    """Compiles a step in this process, and takes one step for each line of standard input."""
    import jax
    from programs import SEED, config_of, noise, programs_of

    from resnet_flax import sharding

    shape = (side, side, 3)
    settings = [f"model.name={network}", f"batch_size={batch}"]
    config = config_of("configs/cifar10.py:resnet20", settings)
    programs, mesh = programs_of(config, 10, shape)
    arrays = jax.device_put(noise(batch, shape, 10), sharding.over_batch(mesh))
    state, seed = programs.init(0), jax.device_put(SEED)

    def step() -> float:
        nonlocal state
        start = time.monotonic()
        state, sums = programs.train_step(state, arrays, seed)
        jax.block_until_ready(sums)
        return time.monotonic() - start

    for _ in range(5):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        step()  # not counted: other points have used the CPU's caches since
        print(step(), flush=True)


class Point:
    """A process that takes steps when asked to."""

    def __init__(self, network: str, batch: int, side: int, devices: int) -> None:
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--point={json.dumps([network, batch, side])}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **allocator.settings(keep=True), "XLA_FLAGS": flags},
        )
        self._read()  # before the next point starts: compiling uses all cores

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a point failed; its output is above")
        return line

    def step(self) -> float:
        """Takes a step; returns its seconds."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return round(float(self._read()), 4)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def in_turns(points: list[tuple[str, int, int, int]], steps: int) -> list[list[float]]:
    """The seconds of each step of each point; in each round every point takes one step."""
    opened: list[Point] = []
    try:
        for point in points:
            opened.append(Point(*point))
        rounds = [[point.step() for point in opened] for _ in range(steps)]
    finally:
        for point in opened:
            point.close()
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def place(axis: str, point: tuple[str, int, int, int]) -> int:
    """The coordinate of a point on its axis."""
    network, batch, side, devices = point
    depth = int(network.split("resnet")[1])
    return {"depth": depth, "batch": batch, "pixels": side * side, "devices": devices}[axis]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws a panel for each axis, with the straight line that fits best."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 3.4), constrained_layout=True)
    for panel, axis in zip(panels, AXES, strict=True):
        mine = [row for row in rows if row["axis"] == axis]
        panel.set_title(TITLES[axis], fontsize=10)
        if not mine:
            continue
        x = np.array([row["at"] for row in mine], float)
        y = np.array([statistics.median(row["seconds"]) for row in mine])
        low, high = (np.array([f(row["seconds"]) for row in mine]) for f in (min, max))
        panel.errorbar(x, y, [y - low, high - y], fmt="o", markersize=4, capsize=3, color="C0")
        slope, level = np.polyfit(x, y, 1, w=1 / y)  # a change in the machine's speed is relative
        ends = np.array([0, x.max()])
        panel.plot(ends, level + slope * ends, color="C1", linewidth=1)
        panel.set_xlabel(axis)
        panel.set_xlim(0)
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a training step")
    figure.savefig(path, dpi=100)


def main() -> int:
    """Measures, writes the results and draws those that there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--batch_divisor", type=int, default=1, help="for a quick look")
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        work(*json.loads(arguments.point))
        return 0

    from resnet_flax.runtime.provenance import provenance
    from resnet_flax.runtime.storage import read_json, write_json

    rows = read_json(arguments.out, list) or []
    for axis in arguments.axes.split(","):
        rows = [row for row in rows if row["axis"] != axis]
        divisor = arguments.batch_divisor
        points = [(name, batch // divisor, *rest) for name, batch, *rest in AXES[axis]]
        for point, seconds in zip(points, in_turns(points, arguments.steps), strict=True):
            middle = statistics.median(seconds)
            print(f"{axis:8} {place(axis, point):6} {middle:7.3f} s", flush=True)
            about = dict(zip(("network", "batch", "side", "devices"), point, strict=True))
            rows.append({"axis": axis, "at": place(axis, point), **about, "seconds": seconds})
            rows[-1] |= provenance()
        write_json(arguments.out, rows)
    if arguments.figure:
        draw(rows, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
