"""Where the time of a training step goes on a device: the kernels of its profile, by kind.

    python benchmarks/profile_step.py --network=resnet50 --batch=256 --out=profile.json
    python benchmarks/profile_step.py --network=cifar_resnet20 --batch=128 --what=resident

Prints the milliseconds of a step by kind of kernel, and the longest kernels. `--hlo=FILE` writes
the optimised program, in which the fusions can be looked up by name.
"""

import argparse
import collections
import glob
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import classes_of, image_shape
from train_step import surroundings, versions

# The first pattern that a kernel's name matches is its kind. Library kernels have no fusion names.
KINDS = (
    ("convolution or product", r"cudnn|cutlass|xmma|nvjet|implicit|conv(?!ert)|gemm|dot|sm\d\d_"),
    ("copy", r"memcpy|memset|copy|transpose|nhwc|nchw"),
    ("reduction", r"reduce"),
    ("elementwise", r""),
)
IN_ONE = 20  # steps per dispatch where what='resident'


def main() -> None:
    """Profiles one step, prints the result and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--what", choices=("train", "resident"), default="train")
    parser.add_argument("--dtype", default="", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=NAME")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--hlo", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    from resnet_flax.runtime.storage import write_json

    about = surroundings()
    dtype = arguments.dtype or ("float32" if "cpu" in about["device"] else "bfloat16")
    overrides = dict(one.split("=") for one in arguments.override)
    program, state, operands = compiled(
        arguments.network, arguments.batch, arguments.what, dtype, overrides
    )
    if arguments.hlo:
        arguments.hlo.write_text(program.as_text())
    seconds, kernels = profile(program, state, operands, arguments.steps)
    found = {
        **{name: getattr(arguments, name) for name in ("network", "batch", "what")},
        "dtype": dtype,
        "overrides": overrides,
        "seconds": seconds,
        "kinds": by_kind(kernels),
        "kernels": kernels,
        **about,
    }
    print(f"{about['device']}, {versions(about)}")
    print(table(found))
    if arguments.out:
        write_json(arguments.out, found)


def compiled(
    network: str, batch: int, what: str, dtype: str, overrides: dict[str, str]
) -> tuple[Any, Any, tuple[Any, ...]]:
    """A compiled step, the state before it and its other operands."""
    import jax
    import numpy as np
    from programs import SEED, config_of_network, noise, programs_of

    from resnet_flax.ops import dispatch

    shape, classes = image_shape(network), classes_of(network)
    config = config_of_network(network, batch, dtype)
    programs, _ = programs_of(config, classes, shape, jax.devices()[:1])
    state, seed = programs.init(0), jax.device_put(SEED)
    if what == "train":
        step, operands = programs.train_step, (jax.device_put(noise(batch, shape, classes)), seed)
    else:
        data = noise(10 * batch, shape, classes)
        order = np.random.default_rng(0).integers(0, 10 * batch, (IN_ONE, batch)).astype(np.int32)
        data = {name: data[name] for name in ("image", "label")}
        step, operands = programs.resident_steps.every, (*jax.device_put((data, order)), seed)
        if step is None:
            step, operands = programs.resident_steps.some, (*operands[:2], np.int32(IN_ONE), seed)
    with dispatch.override(**overrides):
        return step.lower(state, *operands).compile(), state, operands


def profile(
    program: Any, state: Any, operands: Any, steps: int
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of a step without the profiler, and the kernels of a step, the longest first."""
    import jax

    def run(number: int) -> float:
        nonlocal state
        start, sums = time.perf_counter(), None
        for _ in range(number):
            state, sums = program(state, *operands)
        jax.block_until_ready(sums)
        return (time.perf_counter() - start) / number

    in_one = IN_ONE if len(operands) > 2 else 1  # else a batch and the seed
    run(3)
    seconds = run(steps) / in_one
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            run(steps)
        (path,) = glob.glob(f"{scratch}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    total: dict[tuple[str, str], float] = collections.Counter()
    count: dict[tuple[str, str], int] = collections.Counter()
    for event, operation in device_events(data):
        total[event.name, operation] += event.duration_ns
        count[event.name, operation] += 1
    kernels = [
        {
            "kernel": name[:200],
            "operation": operation,
            "times": count[name, operation] / steps / in_one,
            "microseconds": round(nanoseconds / steps / in_one / 1e3, 3),
        }
        for (name, operation), nanoseconds in sorted(total.items(), key=lambda item: -item[1])
    ]
    return seconds, kernels


def device_events(data: Any) -> list[tuple[Any, str]]:
    """Events on the streams of a GPU or, where there is none, operations on the CPU's threads."""
    found = []
    gpu = any("device:GPU" in plane.name for plane in data.planes)
    for plane in data.planes:
        for line in plane.lines:
            if gpu and not ("device:GPU" in plane.name and line.name.startswith("Stream")):
                continue
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                if gpu or operation:
                    found.append((event, operation))
    return found


def by_kind(kernels: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds and number of the kernels of a step, by kind."""
    found = {name: {"milliseconds": 0.0, "kernels": 0.0} for name, _ in KINDS}
    for kernel in kernels:
        kind = next(name for name, pattern in KINDS if re.search(pattern, kernel["kernel"].lower()))
        found[kind]["milliseconds"] += kernel["microseconds"] / 1e3
        found[kind]["kernels"] += kernel["times"]
    return found


def table(found: dict[str, Any]) -> str:
    """The profile as text, 80 columns wide."""
    lines = [
        f"{found['network']}, {found['what']}, batch {found['batch']}, {found['dtype']}: "
        f"{1e3 * found['seconds']:.2f} ms a step, {found['batch'] / found['seconds']:,.0f} images/s"
    ]
    for name, kind in found["kinds"].items():
        lines.append(f"{name:28}{kind['milliseconds']:9.3f} ms {kind['kernels']:8.0f} kernels")
    for kernel in found["kernels"][:25]:
        lines.append(
            f"{kernel['microseconds']:9.1f} us {kernel['times']:4.0f}x "
            f"{kernel['operation'][:22]:22} {kernel['kernel'][:38]}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
