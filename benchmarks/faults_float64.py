"""train.py in float64, which notes the examples of every step; for faults.py.

A training in float32 on other devices is only the same up to rounding, which training amplifies.
The file that the environment variable FAULTS_EXAMPLES names gets a line of JSON for each batch that
a process takes: `step`, `process`, and a number for each example, which depends on its pixels and
its label.
"""

import json
import os
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

EXAMPLES = "FAULTS_EXAMPLES"


def note(step: int, images: Sequence[Any], labels: Sequence[Any]) -> None:
    """Appends a line to the file; short enough to be written at once."""
    import jax

    ids = [zlib.crc32(image.tobytes(), int(y)) for image, y in zip(images, labels, strict=True)]
    line = json.dumps({"step": step, "process": jax.process_index(), "ids": ids}) + "\n"
    with open(os.environ[EXAMPLES], "ab", buffering=0) as file:
        file.write(line.encode())


def use_float64() -> None:
    """Replaces the types of the network, JAX's setting of 64 bits, and the inputs of the loop."""
    import jax
    import jax.numpy as jnp

    from resnet_flax.apply import experiment
    from resnet_flax.models import configured_model
    from resnet_flax.runtime import numerics
    from resnet_flax.training.input import Resident
    from resnet_flax.training.run import Run

    standard, train_batches, advance = numerics.standard, Run.train_batches, Resident.advance

    @contextmanager
    def with_64_bits() -> Iterator[None]:
        with standard(), jax.enable_x64(True):
            yield

    def model(*arguments: Any, **keywords: Any) -> Any:
        return configured_model(*arguments, **keywords).clone(
            dtype=jnp.dtype("float64"), param_dtype=jnp.float64
        )

    @contextmanager
    def noted_batches(self: Run, start: int) -> Iterator[Iterator[Any]]:
        def noted(batches: Iterator[Any]) -> Iterator[Any]:
            for step, batch in enumerate(batches, start + 1):
                note(step, batch["image"], batch["label"])
                yield batch

        with ExitStack() as stack:
            yield noted(stack.enter_context(train_batches(self, start)))

    def noted_advance(self: Any, state: Any, step: int, n: int) -> Any:
        share = self._batch_size // jax.process_count()
        for i in range(step, step + n):
            first = i * self._batch_size + jax.process_index() * share
            chosen = self._sampler.examples(first, share)
            note(i + 1, IMAGES[0][chosen], IMAGES[1][chosen])
        return advance(self, state, step, n)

    def keeping(self: Any, steps: Any, source: Any, *others: Any) -> None:
        IMAGES[:] = [source.images, source.labels]
        begin(self, steps, source, *others)

    begin = Resident.__init__
    numerics.standard = with_64_bits
    experiment.configured_model = model
    Run.train_batches = noted_batches  # type: ignore[method-assign]
    Resident.__init__ = keeping  # type: ignore[method-assign]
    Resident.advance = noted_advance  # type: ignore[method-assign]


# The images and the labels that are resident on the devices.
IMAGES: list[Any] = []


if __name__ == "__main__":  # reader processes import this file
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    from resnet_flax.cli import main_and_exit, train

    run = train.run

    def run_in_float64(arguments: Any) -> int:
        """`train.run`; JAX's client is not made before it has connected the processes."""
        use_float64()
        return run(arguments)

    train.run = run_in_float64
    main_and_exit(["train", *sys.argv[1:]], {"train": "faults_float64.py"})
