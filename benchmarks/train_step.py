"""Compares the speed of this package with its alternatives, in one session.

    python benchmarks/train_step.py --networks=resnet50,resnet18 --batch=16
    python benchmarks/train_step.py --networks=cifar_resnet20 --batch=128 --what=infer
    python benchmarks/train_step.py --sides=ours,ours:statistics=one_pass,ours:--xla_flag=value

Each side runs in a process of its own. In each round every side takes steps for some seconds, so
that a change in the machine's speed affects all of them. The sides:

    ours           this package's step; 'ours:WHAT=NAME' overrides an implementation (see `ops`),
                   'ours:--FLAG=VALUE' passes a flag to XLA
    flax_example   what Flax's ImageNet example computes, rewritten with nn.Conv and nn.BatchNorm
    torch          torchvision's network (for CIFAR-10, that of tests/goldens/torch_cifar.py) in
                   contiguous memory format
    torch_last     the same in channels-last; in bfloat16 under autocast
    torch_compile  the same under torch.compile(mode='max-autotune'); 'torch_compile:MODE' uses
                   another mode

Prints images/s (median and range over the rounds), the ratio of ours to each side, the peak memory
and the seconds of the first step (including compilation), and merges them into a JSON file. No
ratio is printed where the rounds' ratios spread over more than their distance from 1. Ours does
more in a step than the others: the crops and flips of CIFAR-10, and norms of gradients, parameters
and statistics for the log.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resnet_flax.runtime import allocator

HERE = Path(__file__).parent
SIDES = ("ours", "flax_example", "torch", "torch_last", "torch_compile")

# Dense FLOP/s in bfloat16, and bytes/s of memory, from NVIDIA's data sheets.
PEAKS = {"NVIDIA H200": (989e12, 4.8e12), "NVIDIA H100 80GB HBM3": (989e12, 3.35e12)}


class SideError(Exception):
    """A side cannot be measured; its own output says why."""


class Side:
    """A side's process (sides.py), controlled from here."""

    def __init__(self, name: str, network: str, batch: int, what: str, dtype: str) -> None:
        flags = [part for part in name.split(":") if part.startswith("--")]
        # All sides get the allocator that `train` (or `eval`, for inference) chooses for itself.
        chosen = allocator.settings(keep=what != "infer")
        environment = {**os.environ, **chosen, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # All sides use the same single GPU, and no compiled program comes from a cache.
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        self._scratch = tempfile.TemporaryDirectory()
        environment["TORCHINDUCTOR_CACHE_DIR"] = self._scratch.name
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        environment["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "sides.py"), name, network, str(batch), what, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._name = name
        self.ready: dict[str, float] = {}
        self.peak = 0

    def wait(self, limit: float) -> None:
        """Waits until the side has taken its first steps, for at most `limit` seconds."""
        self.ready = self._read(limit)

    def _read(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(limit, self._process.kill)
        timer.start()
        try:
            while not (line := self._process.stdout.readline()).startswith("{"):
                if not line:
                    raise SideError(f"ended, or took more than {limit:.0f} s")
        finally:
            timer.cancel()
        return json.loads(line)

    def take(self, seconds: float) -> list[float]:
        """Takes steps for so long; returns the seconds per step in each half-second stretch."""
        assert self._process.stdin is not None
        try:
            print(seconds, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise SideError("ended") from error
        found = self._read(60 + 10 * seconds)
        self.peak = int(found["peak"])
        return found["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()


def compare(
    network: str,
    batch: int,
    what: str,
    dtype: str,
    sides: list[str],
    rounds: int,
    seconds: float,
    limit: float = 600.0,
    together: bool = False,
) -> dict[str, Any]:
    """The rates of the sides: in each of `rounds` every side takes steps for about `seconds`.

    A side's rate in a round is that of its median stretch of steps, after a warm-up: now and then a
    step has to wait for the machine. A side that fails, or takes longer than `limit` seconds until
    its first steps, is reported as failed. Sides start one after the other, since compiling uses
    all cores, or `together` where there are enough cores.
    """
    opened: dict[str, Side] = {}
    failed: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in sides}

    def unless_it_fails(name: str, function: Callable[[], None]) -> None:
        try:
            function()
        except SideError as failure:
            print(f"{name}: {failure}; see its output", flush=True)
            failed[name] = str(failure)

    try:

        def start(name: str) -> None:
            opened[name] = Side(name, network, batch, what, dtype)
            unless_it_fails(name, lambda: opened[name].wait(limit))

        with ThreadPoolExecutor(len(sides) if together else 1) as starting:
            list(starting.map(start, sides))

        def turn(name: str) -> None:
            rates[name].append(batch / statistics.median(opened[name].take(seconds)))

        for number in range(rounds):
            for name in sides[:: 1 if number % 2 else -1]:
                if name not in failed:
                    unless_it_fails(name, lambda name=name: turn(name))  # type: ignore[misc]
        found: dict[str, Any] = {name: {"error": why} for name, why in failed.items()}
        for name in sides:
            if name in failed:
                continue
            found[name] = {
                "images_per_second": [round(rate, 2) for rate in rates[name]],
                "first_step_seconds": round(opened[name].ready["first_step"], 1),
                "peak_bytes": opened[name].peak,
            }
            if sides[0] not in failed:
                found[name]["ours_by_this"] = [
                    round(ours / rate, 4)
                    for ours, rate in zip(rates[sides[0]], rates[name], strict=True)
                ]
    finally:
        for side in opened.values():
            side.close()
    found = {name: found[name] for name in sides}
    return {"network": network, "batch": batch, "what": what, "dtype": dtype, "sides": found}


def ratio(rounds: list[float]) -> str:
    """The median of the rounds' ratios; '-' if they spread over more than its distance from 1."""
    if not rounds:
        return "-"
    middle, spread = statistics.median(rounds), max(rounds) - min(rounds)
    return f"{middle:.2f}" if spread < abs(middle - 1) else "-"


def table(found: dict[str, Any]) -> str:
    """A comparison as text, 80 columns wide."""
    lines = [
        f"{found['network']}, {found['what']}, batch {found['batch']}, {found['dtype']}",
        f"{'':28}{'images/s':>9} {'(range)':>18} {'ours/it':>8} {'peak':>6} {'first':>7}",
    ]
    for name, side in found["sides"].items():
        if "error" in side:
            lines.append(f"{name[:28]:28}failed: {side['error']}")
            continue
        rates = side["images_per_second"]
        digits = 1 if max(rates) < 100 else 0
        span = f"{min(rates):,.{digits}f} to {max(rates):,.{digits}f}"
        gib = side["peak_bytes"] / 2**30
        said = "" if name == "ours" else ratio(side.get("ours_by_this", []))
        lines.append(
            f"{name[:28]:28}{statistics.median(rates):9,.1f} {span:>18} {said:>8} "
            f"{gib:5.1f}G {side['first_step_seconds']:6.1f}s"
        )
    if "floor" in found:
        floor = found["floor"]
        lines.append(
            f"at most {floor['flops_images_per_second']:,.0f} images/s by FLOPs, "
            f"{floor['bytes_images_per_second']:,.0f} by memory, nothing fused into convolutions"
        )
    return "\n".join(lines)


def floor(network: str, what: str, device: str, dtype: str) -> dict[str, float]:
    """Upper bounds on a device's images/s, by FLOPs and by bytes; empty if its peaks are unknown.

    FLOPs: two per multiply-add, times three in training. Bytes: each convolution reads its input
    and writes its output. The normalisation after it reads that output for its statistics, reads it
    again and writes the activation. Backward, the normalisation reads the feature map and the
    gradient twice and writes once; the convolution reads the gradient twice and its input once and
    writes a gradient. Where a 1x1 convolution widens by four or more, `ops.fused_1x1` counts if it
    moves less: forward, the input is read twice more and the output once less; backward, gradient
    and activation are read, the masked gradient is written and read twice, the input is read twice,
    and two gradients to it are written, which are then summed. Nothing else is counted, and nothing
    is fused into convolutions.
    """
    from sides import classes_of, image_shape

    from resnet_flax.models import create_model
    from resnet_flax.models.summary import summarize

    peaks = next((peaks for name, peaks in PEAKS.items() if name in device), None)
    if peaks is None or dtype != "bfloat16":
        return {}
    model = create_model(network, num_classes=classes_of(network))
    summary = summarize(model, image_shape(network))
    training = what != "infer"
    joins = training and model.norm == "batch" and not model.preactivation
    traffic = 0.0
    for layer in summary.layers:
        if len(layer.kernel) != 4:
            continue
        taken, given = math.prod(layer.input), math.prod(layer.output)
        values = 3 * taken + 11 * given if training else taken + 3 * given
        if joins and layer.kernel[:2] == (1, 1) and layer.kernel[3] >= 4 * layer.kernel[2]:
            values = min(values, 10 * taken + 8 * given)
        traffic += 2 * layer.times * values
    flops = 2.0 * summary.multiply_adds * (3 if training else 1)
    return {
        "flops_images_per_second": round(peaks[0] / flops),
        "bytes_images_per_second": round(peaks[1] / traffic),
    }


def available(sides: list[str]) -> list[str]:
    """The sides that this environment can run; prints which ones it cannot."""
    there = find_spec("torch") and find_spec("torchvision")
    lacking = [name for name in sides if name.startswith("torch") and not there]
    if lacking:
        print(f"without {', '.join(lacking)}: torch and torchvision are not installed")
    return [name for name in sides if name not in lacking]


def main() -> int:
    """Compares, prints and writes; returns 1 if ours is slower than committed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="resnet50", help="names with commas between")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--what", choices=("train", "infer", "resident"), default="train")
    parser.add_argument("--dtype", default="", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--sides", default="ours,flax_example,torch,torch_last")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds to start a side")
    parser.add_argument("--together", action="store_true", help="start the sides all at once")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to merge into")
    parser.add_argument("--against", type=Path, metavar="FILE", help="JSON to compare ratios with")
    arguments = parser.parse_args()

    sides = available(arguments.sides.split(","))
    if strange := [name for name in sides if name.split(":")[0] not in SIDES]:
        parser.error(f"no side is called {', '.join(strange)}; there are {', '.join(SIDES)}")
    if arguments.what == "resident" and any(not name.startswith("ours") for name in sides):
        parser.error("only ours has data that lies on the device; give --sides=ours")

    from resnet_flax.runtime.storage import read_json, write_json

    about = surroundings()
    dtype = arguments.dtype or ("float32" if "cpu" in about["device"] else "bfloat16")
    print(f"{about['device']}, {about['processor']}\n{versions(about)}")
    worse = False
    for network in arguments.networks.split(","):
        found = compare(
            *(network, arguments.batch, arguments.what, dtype, sides),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            limit=arguments.limit,
            together=arguments.together,
        )
        if limits := floor(network, arguments.what, about["device"], dtype):
            found["floor"] = limits
        found |= about
        print(table(found), flush=True)
        if arguments.against:
            said, slower = difference(found, read_json(arguments.against, list) or [])
            print(said)
            worse = worse or slower
        if arguments.out:
            kept = [old for old in read_json(arguments.out, list) or [] if key(old) != key(found)]
            write_json(arguments.out, [*kept, found])
    return int(worse)


def key(found: dict[str, Any]) -> tuple[Any, ...]:
    """Identifies a comparison: a later one with an equal key replaces it."""
    jax = found["versions"]["jax"].rsplit(".", 1)[0]
    names = ("network", "batch", "what", "dtype", "device", "processor")
    return *(found.get(name) for name in names), jax, tuple(found["sides"])


def difference(found: dict[str, Any], committed: list[dict[str, Any]]) -> tuple[str, bool]:
    """Ratios now and the committed ones of the same comparison, and whether one is worse.

    A ratio is worse if its best round is below the worst round of the committed one.
    """
    lines, worse = [], False
    for old in committed:
        if key(old)[:-1] != key(found)[:-1]:
            continue
        for name in found["sides"]:
            then, now = (one["sides"].get(name, {}).get("ours_by_this") for one in (old, found))
            if name == "ours" or not then or not now:
                continue
            slower = max(now) < min(then)
            worse = worse or slower
            lines.append(
                f"ours/{name}: {ratio(now)} now ({min(now):.2f} to {max(now):.2f}), {ratio(then)} "
                f"committed ({min(then):.2f} to {max(then):.2f}){': slower' * slower}"
            )
    return "\n".join(lines) or "nothing committed of this comparison on such a machine", worse


def surroundings() -> dict[str, Any]:
    """Commit, device, processor and versions, and a digest of the source that is compared."""
    # This process compiles nothing, but it may open the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from resnet_flax.runtime.provenance import provenance

    about = provenance()
    about["versions"] |= torch_version()
    package = HERE.parent / "resnet_flax"
    programs = [*sorted(package.rglob("*.py")), HERE / "sides.py", HERE / "train_step.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in programs))
    return {**about, "processor": processor(), "programs": digest.hexdigest()[:16]}


def processor() -> str:
    """Model, widest vector instructions, and number of cores that this process may use.

    The name alone does not suffice: virtual machines name unlike processors the same.
    """
    about: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            about[name.strip()] = value.strip()
    model = about.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in about:
        flags = about.get("flags", "").split()
        vectors = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "no avx")
        model += f" (family {about['cpu family']}, model {about['model']}, {vectors})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def versions(about: dict[str, Any]) -> str:
    """The versions of JAX, Flax and PyTorch, as text."""
    names = about["versions"]
    return ", ".join(f"{name} {names[name]}" for name in ("jax", "flax", "torch") if name in names)


def torch_version() -> dict[str, str]:
    """The versions of torch and torchvision; empty where they are not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"torch": version("torch"), "torchvision": version("torchvision")}
    except PackageNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())
