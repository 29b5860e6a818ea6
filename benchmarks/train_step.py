"""Steps of training and inference beside what a user would pick instead, in one run.

    python benchmarks/train_step.py --networks=resnet50,resnet18 --batch=16
    python benchmarks/train_step.py --networks=cifar_resnet20 --batch=128 --what=infer
    python benchmarks/train_step.py --sides=ours,ours:statistics=one_pass,ours:--xla_flag=value

Sides, each in a process of its own and taken in turns round by round, so that a machine that drifts
drifts for all:

    ours           this package's step; 'ours:WAY=NAME' forces one of models/lowering.py's ways,
                   'ours:--FLAG=VALUE' gives XLA a flag
    flax_example   what Flax's ImageNet example computes, written anew: nn.Conv, nn.BatchNorm
    torch          torchvision's network, contiguous
    torch_last     the same in channels-last, on a GPU under bfloat16 autocast
    torch_compile  the same under torch.compile(mode='max-autotune')

Prints images/s (median and range of the rounds), the ratio of ours to each side, peak memory and
the seconds of the first step (compilation and all), and merges them into a JSON file. Where the
rounds' ratios spread over more than their distance from 1, no ratio is printed. Ours does more in a
step than the others: CIFAR's crops and flips, norms of gradients and parameters for the log.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIDES = ("ours", "flax_example", "torch", "torch_last", "torch_compile")

# Large buffers in huge pages: all sides get what train.py gives itself, see resnet_flax/memory.py.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Dense FLOP/s in bfloat16 and bytes/s of memory, from the makers' data sheets.
PEAKS = {"NVIDIA H200": (989e12, 4.8e12), "NVIDIA H100 80GB HBM3": (989e12, 3.35e12)}


class Side:
    """A worker, driven from here."""

    def __init__(self, name: str, network: str, batch: int, what: str, dtype: str) -> None:
        flags = [part for part in name.split(":") if part.startswith("--")]
        environment = {**os.environ, **ALLOCATOR, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
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

    def wait(self) -> None:
        """Until it has taken its first step."""
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit(f"error: {self._name} ended early; what it said is above")
        return json.loads(line)

    def take(self, seconds: float) -> list[float]:
        """Steps for so long; the seconds of a step in each stretch of a tenth of a second."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        found = self._read()
        self.peak = int(found["peak"])
        return found["seconds"]

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


def compare(
    network: str, batch: int, what: str, dtype: str, sides: list[str], rounds: int, seconds: float
) -> dict[str, Any]:
    """Rates of the sides, taken in turns, each turn of about so many seconds.

    A turn's rate is that of the median stretch of its steps: now and then this or that step has to
    wait for the machine.
    """
    opened: dict[str, Side] = {}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for name in sides:  # one after the other: compiling uses all cores
            opened[name] = Side(name, network, batch, what, dtype)
            opened[name].wait()
        for number in range(rounds):
            order = list(opened)[:: 1 if number % 2 else -1]
            for name in order:
                rates[name].append(batch / statistics.median(opened[name].take(seconds)))
        found = {
            name: {
                "images_per_second": [round(rate, 2) for rate in rates[name]],
                "ours_by_this": [
                    round(ours / rate, 4)
                    for ours, rate in zip(rates[sides[0]], rates[name], strict=True)
                ],
                "first_step_seconds": round(side.ready["first_step"], 1),
                "peak_bytes": side.peak,
            }
            for name, side in opened.items()
        }
    finally:
        for side in opened.values():
            side.close()
    return {"network": network, "batch": batch, "what": what, "dtype": dtype, "sides": found}


def ratio(rounds: list[float]) -> str:
    """The median of the rounds' ratios; a dash where they spread over more than it says."""
    middle, spread = statistics.median(rounds), max(rounds) - min(rounds)
    return f"{middle:.2f}" if spread < abs(middle - 1) else "-"


def table(found: dict[str, Any]) -> str:
    """A comparison, 80 columns."""
    lines = [
        f"{found['network']}, {found['what']}, batch {found['batch']}, {found['dtype']}",
        f"{'':28}{'images/s':>9} {'(range)':>18} {'ours/it':>8} {'peak':>6} {'first':>7}",
    ]
    for name, side in found["sides"].items():
        rates = side["images_per_second"]
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        gib = side["peak_bytes"] / 2**30
        said = "" if name == "ours" else ratio(side["ours_by_this"])
        lines.append(
            f"{name[:28]:28}{statistics.median(rates):9,.1f} {span:>18} {said:>8} "
            f"{gib:5.1f}G {side['first_step_seconds']:6.1f}s"
        )
    if "floor" in found:
        floor = found["floor"]
        lines.append(
            f"floor: {floor['flops_images_per_second']:,.0f} images/s by FLOPs, "
            f"{floor['bytes_images_per_second']:,.0f} by memory traffic"
        )
    return "\n".join(lines)


def floor(network: str, what: str, device: str, dtype: str) -> dict[str, float]:
    """What a device could do at most; empty where its peaks are not known.

    FLOPs: two a multiply-add, three times over in training. Bytes: each convolution reads its input
    and writes its output; the normalisation behind it reads that for its statistics and reads it
    and writes the activation once more. Backward, the normalisation reads map and gradient twice
    and writes once, the convolution reads the gradient twice and its input once and writes a
    gradient. Nothing else is counted, nothing fused into the convolutions.
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
    traffic = 0.0
    for layer in summary.layers:
        if len(layer.kernel) != 4:
            continue
        taken, given = math.prod(layer.input), math.prod(layer.output)
        values = 3 * taken + 11 * given if training else taken + 3 * given
        traffic += 2 * layer.times * values
    flops = 2.0 * summary.multiply_adds * (3 if training else 1)
    return {
        "flops_images_per_second": round(peaks[0] / flops),
        "bytes_images_per_second": round(peaks[1] / traffic),
    }


def available(sides: list[str]) -> list[str]:
    """The sides that this environment has; says which it lacks."""
    lacking = [name for name in sides if name.startswith("torch") and find_spec("torch") is None]
    if lacking:
        print(f"without {', '.join(lacking)}: torch and torchvision are not installed")
    return [name for name in sides if name not in lacking]


def main() -> int:
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="resnet50", help="names with commas between")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--what", choices=("train", "infer", "resident"), default="train")
    parser.add_argument("--dtype", default="", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--sides", default="ours,flax_example,torch,torch_last")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to merge into")
    parser.add_argument("--against", type=Path, metavar="FILE", help="JSON to compare ratios with")
    arguments = parser.parse_args()

    from resnet_flax.provenance import provenance, read_json, write_json

    about = provenance()
    dtype = arguments.dtype or ("float32" if "cpu" in about["device"] else "bfloat16")
    sides = available(arguments.sides.split(","))
    print(f"{about['device']}; {versions(about)}")
    for network in arguments.networks.split(","):
        found = compare(
            *(network, arguments.batch, arguments.what, dtype, sides),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        if limits := floor(network, arguments.what, about["device"], dtype):
            found["floor"] = limits
        found |= {**about, "versions": {**about["versions"], **torch_version()}}
        print(table(found), flush=True)
        if arguments.against:
            print(difference(found, read_json(arguments.against) or []))
        if arguments.out:
            kept = [old for old in read_json(arguments.out) or [] if key(old) != key(found)]
            write_json(arguments.out, [*kept, found])
    return 0


def key(found: dict[str, Any]) -> tuple[Any, ...]:
    """What a later measurement takes the place of: the same on the same kind of machine."""
    jax = found["versions"]["jax"].rsplit(".", 1)[0]
    same = tuple(found[name] for name in ("network", "batch", "what", "dtype", "device"))
    return *same, jax, tuple(found["sides"])


def difference(found: dict[str, Any], committed: list[dict[str, Any]]) -> str:
    """Ratios now beside the committed ones of the same comparison."""
    same = [old for old in committed if key(old)[:-1] == key(found)[:-1]]
    lines = []
    for old in same:
        for name in found["sides"]:
            if name != "ours" and name in old["sides"]:
                then, now = (one["sides"][name]["ours_by_this"] for one in (old, found))
                lines.append(
                    f"ours/{name}: {statistics.median(now):.2f} now "
                    f"({min(now):.2f} to {max(now):.2f}), {statistics.median(then):.2f} in the "
                    f"committed ({min(then):.2f} to {max(then):.2f})"
                )
    return "\n".join(lines) or "nothing committed of this comparison on such a machine"


def versions(about: dict[str, Any]) -> str:
    """Of what is compared."""
    names = {**about["versions"], **torch_version()}
    return ", ".join(f"{name} {names[name]}" for name in ("jax", "flax", "torch") if name in names)


def torch_version() -> dict[str, str]:
    """Empty where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"torch": version("torch"), "torchvision": version("torchvision")}
    except PackageNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())
