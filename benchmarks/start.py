"""How long a run takes until its first step, and how long a deep network takes to compile.

    python benchmarks/start.py --data_dir=DIR

Starts the digits run with an empty compilation cache and then with the cache that this left, each
time until the first step is reported. Also compiles the training step of ResNet-152 (224 pixels,
batch 32) without a cache. Writes the seconds to results/start.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "start.json"


def first_step(data_dir: str, cache: str) -> float:
    """Seconds from the start of train.py until it reports that step 1 is done."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}"]
        command += ["--config.log.every=1", f"--config.data.data_dir={data_dir}"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                seconds = time.monotonic() - start
                process.kill()
                process.communicate()
                return seconds
    raise SystemExit("error: the run ended before its first step; its output is above")


def compiled(name: str, batch: int) -> float:
    """Seconds that the training step of a network takes to compile, including tracing."""
    import jax
    from programs import SEED, batch_shapes, config_of, programs_of

    shape = (224, 224, 3)
    settings = [f"batch_size={batch}", "model.dtype=float32"]
    programs, _ = programs_of(config_of(f"configs/imagenet.py:{name}", settings), 1000, shape)
    arrays = batch_shapes(batch, shape)
    state = jax.eval_shape(programs.init, 0)
    start = time.monotonic()
    programs.train_step.lower(state, arrays, SEED).compile()
    return time.monotonic() - start


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", metavar="DIR", help="of TFDS")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    arguments = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    deep = [compiled("resnet152", 32)]
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    cold, warm = [], []
    for _ in range(arguments.times):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(arguments.data_dir, cache))
            warm.append(first_step(arguments.data_dir, cache))

    from resnet_flax.runtime.provenance import provenance
    from resnet_flax.runtime.storage import write_json

    seconds = {"resnet152_compiles": deep, "digits_cold": cold, "digits_warm": warm}
    rounded = {name: [round(value, 1) for value in values] for name, values in seconds.items()}
    print(rounded)
    write_json(arguments.out, {"seconds": rounded, **provenance()})


if __name__ == "__main__":
    main()
