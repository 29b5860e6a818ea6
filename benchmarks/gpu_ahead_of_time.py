"""What XLA would run on a GPU that this machine lacks: a step's kernels, their bytes, its memory.

    pip install 'jax[cuda13]'     # next to the package, on a machine without a GPU
    python benchmarks/gpu_ahead_of_time.py --network=resnet50 --batch=256
    python benchmarks/gpu_ahead_of_time.py --set=model.remat=1
    python benchmarks/gpu_ahead_of_time.py --network=cifar_resnet20 --batch=128 --what=resident

Compiles for an NVIDIA H200, without autotuning (which would need the device), counts the bytes that
each operation of the program reads and writes, and prints the sums by kind of operation.
`--hlo=FILE` writes the program.
"""

import argparse
import collections
import importlib.metadata
import math
import os
import re
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver whose version to check
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from programs import SEED, batch_shapes, config_of_network, programs_of
from sides import IN_ONE, classes_of, image_shape

from resnet_flax.ops import dispatch
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import read_json, write_json

OUT = Path(__file__).parent.parent / "results" / "gpu_ahead_of_time.json"

# The properties of an H200, as XLA reports them on one.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 15 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""

WIDTHS = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "opt-barrier")
OPERATION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)")


def main() -> None:
    """Compiles one step and reports on it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--what", choices=("train", "resident"), default="train")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=NAME")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--hlo", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to merge into")
    arguments = parser.parse_args()

    program = compiled(arguments)
    text = program.as_text()
    if arguments.hlo:
        arguments.hlo.write_text(text)
    memory = program.memory_analysis()
    kinds = by_kind(operations(text))
    found = {
        **{name: getattr(arguments, name) for name in ("network", "batch", "what")},
        "settings": arguments.settings,
        "overrides": arguments.override,
        "scratch_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "operations": sum(kind["operations"] for kind in kinds.values()),
        "moved_bytes": sum(kind["bytes"] for kind in kinds.values()),
        "kinds": kinds,
        **provenance(),
        "device": "NVIDIA H200, ahead of time",
        "plugin": importlib.metadata.version("jax-cuda13-plugin"),
    }
    print(table(found))
    if arguments.out:
        what = ("network", "batch", "what", "settings", "overrides")
        kept = [_with_overrides(row) for row in read_json(arguments.out, list) or []]
        kept = [row for row in kept if any(row[name] != found[name] for name in what)]
        write_json(arguments.out, [*kept, found])


def _with_overrides(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a results file; before 2026-11-28 its `overrides` were called `ways`."""
    return {"overrides" if key == "ways" else key: value for key, value in row.items()}


def compiled(arguments: argparse.Namespace) -> Any:
    """The compiled step."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET, topology="1x1x1"
    )
    network, batch = arguments.network, arguments.batch
    shape, classes = image_shape(network), classes_of(network)
    config = config_of_network(network, batch, arguments.dtype, arguments.settings)
    programs, _ = programs_of(config, classes, shape, list(topology.devices))
    state = jax.eval_shape(programs.init, 0)
    step, operands = programs.train_step, (batch_shapes(batch, shape), SEED)
    if arguments.what == "resident":
        examples = batch_shapes(50_000, shape)
        step = programs.resident_steps.every
        operands = (
            {name: examples[name] for name in ("image", "label")},
            jax.ShapeDtypeStruct((IN_ONE, batch), np.int32),
            SEED,
        )
    # Pallas asks which GPU it generates code for.
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    there = use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    with there, dispatch.override(**dict(one.split("=") for one in arguments.override)):
        return step.lower(state, *operands).compile()


def operations(text: str) -> list[tuple[str, str, int]]:
    """Name, kind and bytes of each operation of the longest computation that is not a fusion's."""
    computations: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and ") -> " in line:
            name = line.split(" (")[0]
            computations[name] = []
        computations[name].append(line.strip())
    whole = [
        lines
        for name, lines in computations.items()
        if not name.startswith(("%fused", "%gemm", "%wrapped"))
    ]
    shapes: dict[str, str] = {}
    found = []
    for line in max(whole, key=len):
        match = OPERATION.match(re.sub(r"/\*.*?\*/", "", line))
        if not match:
            continue
        name, shape, operation, operands, rest = match.groups()
        shapes[name] = shape
        if operation in FREE:
            continue
        if operation == "fusion":
            operation = re.sub(r"[.\d]+$", "", name)
        elif operation == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', rest)
            operation = target[1] if target else operation
        read = [shapes.get(operand.strip().lstrip("%"), "") for operand in operands.split(",")]
        found.append((name, operation, sum(map(size, [shape, *read]))))
    return found


def size(shape: str) -> int:
    """Bytes of an array by its HLO shape, or of all arrays of a tuple."""
    return sum(
        WIDTHS[kind] * math.prod(int(n) for n in sides.split(",") if n)
        for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind in WIDTHS
    )


def by_kind(found: list[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Number and bytes of the operations of each kind; the kind that moves most comes first."""
    number: dict[str, int] = collections.Counter()
    moved: dict[str, int] = collections.Counter()
    for _, kind, count in found:
        number[kind] += 1
        moved[kind] += count
    return {
        kind: {"operations": number[kind], "bytes": moved[kind]}
        for kind in sorted(moved, key=lambda kind: -moved[kind])
    }


def table(found: dict[str, Any]) -> str:
    """The report as text, 80 columns wide."""
    lines = [
        f"{found['network']}, {found['what']}, batch {found['batch']}, {found['device']}: "
        f"{found['scratch_bytes'] / 2**30:.2f} GiB of scratch"
    ]
    for kind, of_kind in list(found["kinds"].items())[:20]:
        lines.append(f"{of_kind['bytes'] / 1e9:9.3f} GB {of_kind['operations']:5} {kind[:58]}")
    lines.append(f"{found['moved_bytes'] / 1e9:9.3f} GB {found['operations']:5} in total")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
