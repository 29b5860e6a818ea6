"""What the TPU compiler makes of the training step, on a machine without a TPU.

    pip install 'resnet_flax[tpu]'   # Python 3.12; installs libtpu
    python benchmarks/tpu_ahead_of_time.py --topology=v5e:2x4 --fsdp=1

Compiles the step of a config for a TPU slice, with the collectives and memory that it would have
there, and adds these to results/tpu_ahead_of_time.json: the memory of a chip in bytes and, for each
kind of collective, their number, the bytes that a chip receives in a step, and the elements of the
largest array. '--config.KEY=VALUE' changes a key of the config. One program takes a minute or two
on two cores; `make tpu-ahead-of-time` writes the whole file.
"""

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so no lock is needed

import jax
from jax.experimental import topologies
from programs import SEED, batch_shapes, config_of, programs_of

from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import write_json
from resnet_flax.training.collectives import collectives, totals

OUT = Path(__file__).parent.parent / "results" / "tpu_ahead_of_time.json"


def main() -> None:
    """Compiles one step and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/imagenet.py:resnet50")
    parser.add_argument("--topology", default="v5e:2x4", help="such as v5e:2x4 or v5e:16x16")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--batch_per_chip", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=0, help="where the config has none")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments, rest = parser.parse_known_args()
    if strange := [flag for flag in rest if not flag.startswith("--config.")]:
        parser.error(f"unknown arguments: {' '.join(strange)}")
    changed = [flag.removeprefix("--config.") for flag in rest]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    devices = list(topology.devices)
    batch = arguments.batch_per_chip * len(devices)
    settings = [f"batch_size={batch}", f"mesh.fsdp={arguments.fsdp}", *changed]
    config = config_of(arguments.config, settings)
    side = arguments.image_size or config.data.size
    shape = (side, side, 3)
    programs, mesh = programs_of(config, arguments.classes, shape, devices)
    state = jax.eval_shape(programs.init, 0)
    lowered = programs.train_step.lower(state, batch_shapes(config.batch_size, shape), SEED)
    start = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    found = {
        "config": arguments.config,
        "settings": changed,
        "topology": arguments.topology,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "compile_seconds": round(seconds, 1),
        "bytes_per_chip": {
            "arguments": memory.argument_size_in_bytes,
            "scratch": memory.temp_size_in_bytes,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "collectives": totals(collectives(compiled.as_text())),
        "libtpu": importlib.metadata.version("libtpu"),
        **provenance(),
    }
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    what = ("config", "settings", "topology", "mesh", "batch_size")
    kept = [row for row in kept if any(row.get(key) != found[key] for key in what)]
    write_json(arguments.out, [*kept, found])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
