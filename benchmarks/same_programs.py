"""Whether two versions of this package compute the same: compares their programs' operations.

    python benchmarks/same_programs.py write before.json     # in the version before
    python benchmarks/same_programs.py compare before.json   # in the version after

Lowers the gradient and the inference of one network of each kind, for CPU, GPU (with and without
our own kernels) and TPU, none of which has to be present, and one complete training step. Counts
the StableHLO operations with their types and attributes, ignoring their order and names, and
records the names, shapes and types of all variables. `compare` lists the differences, and exits
with status 1 where there are any.
"""

import argparse
import collections
import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from programs import SEED, batch_shapes, config_of, for_one_gpu, programs_of

from resnet_flax import create_model
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import write_json

TWO = {"stage_sizes": (2, 2, 2, 2)}


class Network(NamedTuple):
    """A network and what it is lowered for.

    Attributes:
      variant: see `create_model`.
      platform: 'cuda', 'cpu' or 'tpu'.
      side: height and width of the images, in pixels.
      batch: number of images.
      overrides: arguments that differ from the variant's.
      one_gpu: lower for a single GPU of the kind that our own kernels are for.
    """

    variant: str
    platform: str = "cuda"
    side: int = 224
    batch: int = 32
    overrides: dict[str, Any] = TWO
    one_gpu: bool = False

    @property
    def dtype(self) -> str:
        """The type of the computation."""
        return "float32" if self.platform == "cpu" else "bfloat16"


CIFAR: dict[str, Any] = {"side": 32, "batch": 128, "overrides": {}}
PREACTIVATION = {**CIFAR, "overrides": {"stage_sizes": (2, 2, 2)}}
SCANNED = {"stage_sizes": (3, 4, 6, 3), "scan": True, "remat": 2}
CAFFE = {**TWO, "stem_bias": True, "stem_pool": "ceil"}
NETWORKS = {
    "ResNet-20, kernels": Network("cifar_resnet20", **CIFAR, one_gpu=True),
    "ResNet-20, kernels, batch 8": Network("cifar_resnet20", **{**CIFAR, "batch": 8}, one_gpu=True),
    "ResNet-20, GPU": Network("cifar_resnet20", **CIFAR),
    "ResNet-20, CPU": Network("cifar_resnet20", "cpu", **CIFAR),
    "option C": Network(
        "cifar_resnet20", **{**CIFAR, "overrides": {"shortcut": "C"}}, one_gpu=True
    ),
    "plain": Network("cifar_plain20", **CIFAR, one_gpu=True),
    "pre-activation": Network("cifar_resnetv2_164", **PREACTIVATION, one_gpu=True),
    "ResNet-50, GPU": Network("resnet50"),
    "ResNet-50, one GPU": Network("resnet50", one_gpu=True),
    "ResNet-50, TPU": Network("resnet50", "tpu"),
    "ResNet-50, CPU": Network("resnet50", "cpu"),
    "groups of normalisation": Network("resnet50", overrides={**TWO, "ghost_batches": 4}),
    "scan and remat": Network("resnet50", overrides=SCANNED),
    "v1, bias, ceil": Network("resnet50_v1", "cpu", overrides=CAFFE),
    "squeeze and excitation": Network("seresnet50"),
    "ResNet-D": Network("resnet50d"),
    "group normalisation": Network("resnet50", overrides={**TWO, "norm": "group"}),
    "ResNeXt": Network("resnext50_32x4d", "cpu"),
    "ResNet-18, CPU": Network("resnet18", "cpu", batch=16, overrides={}),
}


def main() -> int:
    """Writes or compares; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path, help="operations by program, some megabytes")
    parser.add_argument("--digests", type=Path, help="JSON of their numbers and digests, to keep")
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    arguments = parser.parse_args()
    found = {}
    for name, network in NETWORKS.items():
        if arguments.only in name:
            found |= lowered(name, network)
            print(name, flush=True)
    if arguments.only in "training step":
        found |= whole_step()
    if arguments.digests:
        summary = {name: summarized(operations) for name, operations in found.items()}
        write_json(arguments.digests, {"programs": summary, **provenance()})
    if arguments.what == "write":
        write_json(arguments.file, found)
        return 0
    before = json.loads(arguments.file.read_text())
    different = [name for name in found if found[name] != before.get(name)]
    for name in different:
        print(f"\n{name}:")
        gone = collections.Counter(before.get(name, {}))
        gone.subtract(found[name])
        for operation, count in sorted(gone.items(), key=lambda item: -abs(item[1]))[:20]:
            if count:
                print(f"  {-count:+d}  {operation[:200]}")
    print(f"{len(found) - len(different)} of {len(found)} are the same")
    return int(bool(different))


def summarized(operations: dict[str, int]) -> str:
    """Number and digest of a program's operations."""
    digest = hashlib.sha256(json.dumps(operations).encode()).hexdigest()
    return f"{sum(operations.values())} {digest[:16]}"


def lowered(name: str, network: Network) -> dict[str, dict[str, int]]:
    """The operations of a network's gradient and inference, and its variables."""
    dtype = jnp.dtype(network.dtype)
    model = create_model(network.variant, num_classes=10, dtype=dtype, **network.overrides)
    x = jax.ShapeDtypeStruct((network.batch, network.side, network.side, 3), dtype)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)

    def loss(params: Any, stats: Any, x: Any) -> Any:
        given = {"params": params, "batch_stats": stats}
        logits, updated = model.apply(given, x, train=True, mutable=["batch_stats"])
        return (logits**2).sum(), updated

    def infer(variables: Any, x: Any) -> Any:
        return model.apply(variables, x, train=False)

    gradient = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    simple = jax.tree_util.keystr
    return {
        f"{name}: gradient": operations(
            gradient, network, variables["params"], variables.get("batch_stats", {}), x
        ),
        f"{name}: inference": operations(infer, network, variables, x),
        f"{name}: variables": {
            f"{simple(path, simple=True, separator='/')} {leaf.dtype} {list(leaf.shape)}": 1
            for path, leaf in leaves
        },
    }


def whole_step() -> dict[str, dict[str, int]]:
    """The training step of configs/cifar10.py as a run on this machine compiles it."""
    config = config_of("configs/cifar10.py:resnet20", [])
    programs, _ = programs_of(config, 10, (32, 32, 3), jax.devices()[:1])
    state = jax.eval_shape(programs.init, 0)
    lowered = programs.train_step.lower(state, batch_shapes(config.batch_size, (32, 32, 3)), SEED)
    text = lowered.as_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {
        "training step": count(text),
        "training step: its text": {digest: 1},
    }


def operations(function: Callable[..., Any], network: Network, *arguments: Any) -> dict[str, int]:
    """How often each operation occurs in the program of a function."""
    jitted = for_one_gpu(function) if network.one_gpu else jax.jit(function)
    return count(jitted.trace(*arguments).lower(lowering_platforms=(network.platform,)).as_text())


def count(text: str) -> dict[str, int]:
    """How often each operation is executed; a function counts at each call."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in text.splitlines():
        function = re.match(r"\s*func\.func (?:public |private )?@(\S+?)\(", line)
        if function:
            body = bodies.setdefault(function[1], [])
        elif line.strip() not in ("", "}", "{") and not line.startswith("module"):
            body.append(line.strip())

    def of(name: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for line in bodies[name]:
            called = re.search(r"(?<!custom_)call @([\w.$-]+)\(", line)
            if called:
                total.update(of(called[1]))
            elif not line.startswith(("return", "func.return", "stablehlo.return", "}")):
                total[nameless(line)] += 1
        return total

    return dict(sorted(of("main").items()))


def nameless(line: str) -> str:
    """An operation without the names of its values and without the code of a kernel."""
    line = re.sub(r"%[\w#:]+", "%", line)
    if "custom_call" in line:
        line = re.sub(r"\{.*\} : ", "{code} : ", line)
    return re.sub(r"dense<\"0x[0-9A-F]*\">", "dense", line)


if __name__ == "__main__":
    sys.exit(main())
