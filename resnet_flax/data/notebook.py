"""Batches for a notebook, shown as images."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data.pipeline import Batch, eval_batches, train_batches
from resnet_flax.data.pixels import Pixels
from resnet_flax.data.sources import Source, check_source, open_source, without_auto
from resnet_flax.data.transforms import EvalTransform, TrainTransform
from resnet_flax.errors import UserError


class Batches:
    """Batches of a split, made by `batches`; every iteration starts from the beginning.

    Attributes:
      source: the examples.
      class_names: of the labels.
    """

    def __init__(
        self, source: Source, batch_size: int, transform: Any, seed: int | None, epochs: int
    ) -> None:
        self.source, self.class_names = source, source.class_names
        self._batch_size, self._transform = batch_size, transform
        self._seed, self._epochs = seed, epochs

    def __len__(self) -> int:
        if self._seed is None:
            return -(-len(self.source) // self._batch_size)
        return self._epochs * len(self.source) // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        settings = {"batch_size": self._batch_size, "transform": self._transform}
        if self._seed is None:
            reading = eval_batches(self.source, **settings)
        else:
            reading = train_batches(self.source, seed=self._seed, **settings)
        with reading as batches:
            yield from islice(batches, len(self))

    def __repr__(self) -> str:
        names = ", ".join(self.class_names[:10]) + ", ..." * (len(self.class_names) > 10)
        return (
            f"{len(self)} batches of {self._batch_size}, {len(self.source):,} images, "
            f"{len(self.class_names)} classes: {names}"
        )

    def show(self, columns: int = 8, rows: int = 3) -> Image.Image:
        """The first images with the names of their classes, for a notebook to display."""
        batch = next(iter(self))
        shown = min(columns * rows, int(batch["mask"].sum()))
        titles = [self.class_names[label] for label in batch["label"][:shown]]
        return grid(batch["image"][:shown], titles, columns)

    def _repr_png_(self) -> bytes | None:
        return self.show()._repr_png_()


def batches(
    source: str | Source,
    split: str = "train",
    *,
    batch_size: int = 32,
    size: int = 0,
    crop: str = "random_resized",
    shuffle: bool = False,
    seed: int = 0,
    epochs: int = 1,
    data_dir: str = "",
    exif: str = "auto",
    alpha: str = "auto",
    channels: int = 0,
) -> Batches:
    """Batches to display or to loop over, read in this process.

    Args:
      source: 'tfds:NAME', 'folder:DIR', or a source such as `ArraySource(images, labels,
        class_names)`, for which `split` is ignored.
      split: see `open_source`.
      batch_size: images in a batch.
      size: side of the images; 0 leaves them as they are, and they must have the same size.
      crop: 'random_resized' or 'jitter' if shuffled; otherwise a centre crop is taken.
      shuffle: in random order, full batches only; otherwise in order, each image once, the last
        batch padded with copies whose `mask` is false.
      seed: of the order and the crops.
      epochs: number of times that each image occurs if shuffled.
      data_dir: of TFDS.
      exif: as the config key `data.exif`.
      alpha: as the config key `data.alpha`.
      channels: as the config key `data.channels`.

    Returns:
      An iterable of dicts of `image` `[b, h, w, c]` uint8, `label` `[b]` int32 and `mask` `[b]`
      bool, with `class_names`; as the last line of a notebook's cell it displays a grid of images.
    """
    if batch_size < 1 or size < 0 or epochs < 1:
        raise UserError("batch_size and epochs must be at least 1, and size at least 0")
    if crop not in ("random_resized", "jitter"):
        raise UserError(f"crop must be random_resized or jitter, not {crop!r}")
    if isinstance(source, str):
        opened = open_source(source, split, data_dir)
    else:
        opened = check_source(source, "source")
    given = {"exif": exif, "alpha": alpha, "channels": channels}
    pixels = Pixels(**without_auto(source if isinstance(source, str) else "", given))
    if not shuffle:
        return Batches(opened, batch_size, EvalTransform(size, pixels=pixels), None, 1)
    jitter = (round(size * 256 / 224), round(size * 480 / 224))  # as the paper's at 224
    transform = TrainTransform(crop if size else "none", (size,), jitter=jitter, pixels=pixels)
    return Batches(opened, batch_size, transform, seed, epochs)


def grid(images: np.ndarray, titles: Sequence[str] = (), columns: int = 8) -> Image.Image:
    """Images side by side with a title above each.

    Args:
      images: `[n, h, w, c]` uint8.
      titles: one for each image, or none.
      columns: of the grid.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    height, width, grey = *images.shape[1:3], images.shape[3] == 1
    figure = Figure((1.5 * columns, (1.5 * height / width + 0.25) * rows), dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, image in enumerate(images):
        axis = axes.flat[i]
        axis.imshow(image.squeeze(-1) if grey else image, cmap="gray", vmin=0, vmax=255)
        if titles:
            axis.set_title(_short(titles[i]), fontsize=9, pad=3)
    figure.tight_layout(pad=0.3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _short(title: str, letters: int = 16) -> str:
    return title if len(title) <= letters else title[: letters - 1] + "…"
