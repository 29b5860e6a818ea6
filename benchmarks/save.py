"""How long the training waits for a checkpoint of ResNet-50's size, in milliseconds.

Run `python benchmarks/save.py --workdir=DIR`, with DIR on the disk in question. Saves with and
without syncing alternate. The program does nothing else until a save has finished in the
background. Writes results/save.json.
"""

import argparse
import contextlib
import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from resnet_flax import create_model
from resnet_flax.runtime import storage
from resnet_flax.runtime.provenance import provenance
from resnet_flax.runtime.storage import write_json
from resnet_flax.training.checkpoint import Checkpoints
from resnet_flax.training.state import init_state

OUT = Path(__file__).parent.parent / "results" / "save.json"


def make_state():
    """A train state of ResNet-50 with the momentum of SGD, filled with random numbers."""
    model = create_model("resnet50")
    init = partial(init_state, model=model, tx=optax.sgd(0.1, 0.9), image_shape=(224, 224, 3))
    key = jax.random.key(0)

    def draw(leaf):
        return jax.random.normal(key, leaf.shape) if leaf.ndim else jnp.zeros((), leaf.dtype)

    return jax.block_until_ready(jax.tree.map(draw, jax.eval_shape(init, 0)))


def measure(checkpoints: Checkpoints, step: int, state) -> dict[str, float]:
    """Milliseconds of one save: waiting at its step, in the background, waiting when it is done."""
    began = time.perf_counter()
    checkpoints.save(step, state, {})
    waited = time.perf_counter()
    while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.001)
    done = time.perf_counter()
    checkpoints.poll()
    end = time.perf_counter()
    return {
        "at_its_step": 1000 * (waited - began),
        "in_the_background": 1000 * (done - waited),
        "when_done": 1000 * (end - done),
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where to write checkpoints")
    parser.add_argument("--rounds", type=int, default=8, help="saves of either kind")
    arguments = parser.parse_args()
    state = make_state()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    figures: dict[str, list[dict[str, float]]] = {"synced": [], "not_synced": []}
    with Checkpoints(arguments.workdir / "checkpoints", keep=2) as checkpoints:
        measure(checkpoints, 1, state)  # the first save compiles the digests
        for step in range(2, 2 + 2 * arguments.rounds):
            kind = "synced" if step % 2 else "not_synced"
            with contextlib.ExitStack() as stack:
                if kind == "not_synced":
                    for name in ("sync_tree", "sync_file", "sync_directory"):
                        stack.enter_context(mock.patch.object(storage, name))
                figures[kind].append(measure(checkpoints, step, state))
    shutil.rmtree(arguments.workdir / "checkpoints")
    summary = {
        kind: {
            name: {
                "median": round(statistics.median(values), 1),
                "least": round(min(values), 1),
                "most": round(max(values), 1),
            }
            for name in rows[0]
            for values in [[row[name] for row in rows]]
        }
        for kind, rows in figures.items()
    }
    waited = [row["at_its_step"] + row["when_done"] for row in figures["synced"]]
    result = {
        "unit": "ms",
        "bytes": size,
        "rounds": arguments.rounds,
        **summary,
        "share_of_a_minute": round(max(waited) / 60_000, 4),
        "command": f"python benchmarks/save.py --workdir=DIR --rounds={arguments.rounds}",
        **provenance(),
    }
    write_json(OUT, result)
    print(f"{size / 1e6:.0f} MB; at most {max(waited):.0f} ms of waiting a save")
    for kind, rows in summary.items():
        print(kind, {name: row["median"] for name, row in rows.items()})


if __name__ == "__main__":
    main()
