"""From a source to batches: shard, shuffle, batch, prefetch. A pure function of (seed, step)."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError

Batch = dict[str, np.ndarray]


@contextlib.contextmanager
def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Iterator[Iterator[Batch]]:
    """This host's shares of the global batches `start`, `start + 1`, ... without end.

    The stream of examples is one permutation of the source after another, each from the seed;
    batch s is its examples `s * batch_size` and following. A host's share is a contiguous run.
    Nothing is read that comes before `start`.

    Args:
      source: examples.
      seed: of the permutations.
      batch_size: of the global batch.
      start: the first batch, counted from 0.
      host: number of this host.
      hosts: number of all hosts.
      workers: reader processes; 0 reads in threads of this one.

    Yields:
      An iterator over dicts of `image` `[b, h, w, c]` uint8, `label` `[b]` int32 and `mask`
      `[b]`, all true. Leaving the context ends the readers.
    """
    if batch_size > len(source):
        raise UserError(f"batch_size={batch_size} is more than the {len(source)} training examples")
    if batch_size % hosts:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {hosts} hosts")
    shares = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size // hosts)[start * hosts + host :: hosts]
        .map(_with_mask)
    )
    # An element is a batch here, so a few ahead are enough.
    dataset = shares.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers insist, in notebooks too
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_leave_interrupts
        )
    batches = iter(dataset)
    try:
        yield batches
    finally:
        batches.close()


def eval_batches(
    source: Source, *, batch_size: int, host: int = 0, hosts: int = 1
) -> Iterator[Batch]:
    """This host's shares of the global batches that hold every example once, in order.

    The last batch is filled up with copies of its first example, whose `mask` is false; every
    host gets the same number of batches.
    """
    share = batch_size // hosts
    for first in range(0, len(source), batch_size):
        wanted = range(first + host * share, first + (host + 1) * share)
        examples = [source[i if i < len(source) else first] for i in wanted]
        batch = {name: np.stack([e[name] for e in examples]) for name in ("image", "label")}
        yield {**batch, "mask": np.array([i < len(source) for i in wanted])}


def _leave_interrupts(*_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _with_mask(batch: dict[str, Any]) -> Batch:
    return {**batch, "mask": np.ones(len(batch["label"]), bool)}
