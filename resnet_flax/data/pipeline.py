"""From a source to batches, a pure function of (seed, step): order, shard, transform, prefetch."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from resnet_flax.data.pixels import IGNORED, Pixels
from resnet_flax.data.readers import PATIENT, Patience, reading
from resnet_flax.data.sampler import Sampler
from resnet_flax.data.sources import Source
from resnet_flax.data.sources.parts import example_of, label_of
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import SettingError, UserError

Batch = dict[str, np.ndarray]
# Of an example's arrays: `image` and, where it may have several correct labels, `valid_labels`.
Shapes = dict[str, tuple[int, ...]]


class Ignored:
    """Counts the examples of which a preprocessing ignores something.

    Args:
      pixels: of the preprocessing.

    Attributes:
      counts: of examples, `[2]` for `pixels.IGNORED`.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels, self.counts = pixels, np.zeros(len(IGNORED), int)

    def counted(self, elements: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches or examples, without their `ignored`, which is added to the counts."""
        for element in elements:
            self.counts += element.pop("ignored")
            yield element


@dataclasses.dataclass(frozen=True)
class TrainShares:
    """A host's parts of the global training batches, by the batch's number.

    `Sampler` defines the stream of examples; batch s starts at position
    `(s + data_offset) * batch_size`, and a host's part of it is contiguous. An example's random
    draws depend on the seed and its position.
    """

    source: Source
    sampler: Sampler
    transform: Callable[[Any, np.random.Generator, int], np.ndarray]
    batch_size: int
    host: int
    hosts: int
    start: int
    data_offset: int = 0

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, index: int) -> Batch:
        step = self.start + index
        share = self.batch_size // self.hosts
        first = (step + self.data_offset) * self.batch_size + self.host * share
        indices = self.sampler.examples(first, share)
        examples = [example_of(self.source, int(i)) for i in indices]
        images = [
            self.transform(example["image"], _generator(self.sampler.seed, first + i), step)
            for i, example in enumerate(examples)
        ]
        return _batch(self.source, images, examples, np.ones(share, bool))


@dataclasses.dataclass(frozen=True)
class EvalShares:
    """A host's parts of the global batches that contain every example once, in order.

    The last batch is padded with copies of its first example, whose `mask` is false; every host
    gets the same number of batches. With `pixels`, a batch has the number of examples of which
    these ignore something too, see `Pixels.ignored`.
    """

    source: Source
    transform: Callable[[Any], np.ndarray]
    batch_size: int
    host: int
    hosts: int
    pixels: Pixels | None = None

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        first, share = index * self.batch_size, self.batch_size // self.hosts
        wanted = range(first + self.host * share, first + (self.host + 1) * share)
        indices = [i if i < len(self.source) else first for i in wanted]
        examples = [example_of(self.source, i) for i in indices]
        images = [self.transform(example["image"]) for example in examples]
        mask = np.array([i < len(self.source) for i in wanted])
        batch = _batch(self.source, images, examples, mask)
        if self.pixels is not None:
            found = [self.pixels.ignored(example["image"]) for example in examples]
            batch["ignored"] = (np.array(found) & mask[:, None]).sum(0)
        return batch


@dataclasses.dataclass(frozen=True)
class Examples:
    """Every example once, in order, with its transformed image and its `index`.

    With `pixels`, also with what these ignore of it, see `Pixels.ignored`.
    """

    source: Source
    transform: Callable[[Any], np.ndarray]
    pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = example_of(self.source, index)
        label = label_of(example, len(self.source.class_names))
        image = self.transform(example["image"])
        found = {**example, "image": image, "label": label, "index": index}
        if self.pixels is not None:
            found["ignored"] = self.pixels.ignored(example["image"])
        return found


@contextlib.contextmanager
def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    transform: Callable[..., np.ndarray] | None = None,
    repeats: int = 1,
    start: int = 0,
    data_offset: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    patience: Patience = PATIENT,
) -> Iterator[Iterator[Batch]]:
    """This host's parts of the global batches `start`, `start + 1`, ..., endlessly.

    Nothing before `start` is read.

    Args:
      source: examples.
      seed: of order and transforms.
      batch_size: of the global batch.
      transform: see `transforms.TrainTransform`; its default changes nothing.
      repeats: see `Sampler`.
      start: the first batch, counted from 0.
      data_offset: number of earlier batches that were left out.
      host: index of this host.
      hosts: number of hosts.
      workers: reader processes; 0 reads in threads of this one.
      patience: see `readers.reading`.

    Yields:
      An iterator over dicts of `image` `[b, h, w, c]` uint8, `label` `[b]` int32 and `mask`
      `[b]`, all true. Leaving the context stops the readers.
    """
    if batch_size > len(source):
        raise UserError(f"batch_size={batch_size} is more than the {len(source)} training examples")
    if batch_size % hosts:
        raise UserError(f"batch_size={batch_size} must be a multiple of the {hosts} hosts")
    sampler = Sampler(len(source), seed, repeats)
    shares = TrainShares(
        source,
        sampler,
        transform or TrainTransform(),
        batch_size,
        host,
        hosts,
        start,
        data_offset,
    )
    with reading(shares, workers, patience) as batches:
        yield batches


@contextlib.contextmanager
def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[Any], np.ndarray] | None = None,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    patience: Patience = PATIENT,
    ignored: Ignored | None = None,
) -> Iterator[Iterator[Batch]]:
    """This host's parts of the global batches that contain every example once, in order.

    Args:
      source: examples.
      batch_size: of the global batch.
      transform: see `transforms.EvalTransform`; its default changes nothing.
      host: index of this host.
      hosts: number of hosts.
      workers: reader processes; 0 reads in threads of this one.
      patience: see `readers.reading`.
      ignored: counts those of this host's examples of which something is ignored.

    Yields:
      An iterator over batches as `train_batches` yields; `mask` is false for padding.
    """
    pixels = ignored.pixels if ignored else None
    shares = EvalShares(source, transform or EvalTransform(), batch_size, host, hosts, pixels)
    with reading(shares, workers, patience) as batches:
        yield batches if ignored is None else ignored.counted(batches)


@contextlib.contextmanager
def eval_examples(
    source: Source,
    transform: Callable[[Any], np.ndarray],
    workers: int = 0,
    ignored: Ignored | None = None,
) -> Iterator[Iterator[dict[str, Any]]]:
    """Every example once, in order, for transforms whose images differ in shape.

    Args:
      source: examples.
      transform: of an image.
      workers: reader processes; 0 reads in threads of this one.
      ignored: counts the examples of which something is ignored.

    Yields:
      An iterator over dicts of the example's entries and its `index`.
    """
    pixels = ignored.pixels if ignored else None
    with reading(Examples(source, transform, pixels), workers) as examples:
        yield examples if ignored is None else ignored.counted(examples)


def shapes_of(example: Mapping[str, Any], image: np.ndarray) -> Shapes:
    """The shapes of an example with that image in place of its own."""
    more = {"valid_labels": np.shape(example["valid_labels"])} if "valid_labels" in example else {}
    return {"image": image.shape, **more}


def blank_batch(shapes: Shapes, size: int) -> Batch:
    """A batch of zeros, or a part of one, of which no example counts.

    Args:
      shapes: of an example.
      size: number of examples.
    """
    types = {"image": np.uint8, "valid_labels": bool}
    arrays = {name: np.zeros((size, *shape), types[name]) for name, shape in shapes.items()}
    return {**arrays, "label": np.zeros(size, np.int32), "mask": np.zeros(size, bool)}


def _generator(seed: int, position: int) -> np.random.Generator:
    # The permutations use the same keys, with another counter.
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1]))


def different_sizes(said: str) -> SettingError:
    """The error for images that cannot be in one batch."""
    return SettingError(
        f"{said};",
        "data.size",
        "set data.size, with data.crop for training, so that they get the same size",
    )


def _batch(
    source: Source, images: list[np.ndarray], examples: list[Any], mask: np.ndarray
) -> Batch:
    if len({image.shape for image in images}) > 1:
        sizes = sorted({str(image.shape) for image in images})[:3]
        raise different_sizes(f"the images have different sizes ({', '.join(sizes)}, ...)")
    labels = [label_of(example, len(source.class_names)) for example in examples]
    batch = {"image": np.stack(images), "label": np.array(labels, np.int32), "mask": mask}
    if "valid_labels" in examples[0]:
        batch["valid_labels"] = np.stack([example["valid_labels"] for example in examples])
    return batch
