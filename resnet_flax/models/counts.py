"""Parameters, multiply-adds and layers of the named networks, without tracing them.

Counting a network takes about half a second, and importing JAX as long, so `counts.json` comes with
the package. `python -m resnet_flax.models.counts` counts all networks again and writes it.
"""

import json
from pathlib import Path
from typing import NamedTuple

from resnet_flax.models.variants import VARIANTS

FILE = Path(__file__).with_suffix(".json")


class Counts(NamedTuple):
    """What `resnet-flax models` lists of a network.

    Attributes:
      parameters: see `summary.Summary`.
      multiply_adds: for one image, see `summary.Summary`.
      layers: the `depth` of `summary.Summary`.
      image: side of that image in pixels.
    """

    parameters: int
    multiply_adds: int
    layers: int
    image: int


def stored() -> dict[str, Counts]:
    """The table in `counts.json`, by the name of the network."""
    return {name: Counts(**row) for name, row in json.loads(FILE.read_text()).items()}


def count(name: str) -> Counts:
    """Counts a network by tracing it.

    Args:
      name: a key of `VARIANTS`.
    """
    from resnet_flax.models.registry import create_model
    from resnet_flax.models.summary import native_size, summarize

    model = create_model(name)
    side = native_size(model)
    summary = summarize(model, (side, side, 3))
    return Counts(summary.parameters, summary.multiply_adds, summary.depth, side)


def write(file: Path = FILE) -> None:
    """Counts all networks, and writes the table with one line for each."""
    rows = [f'  "{name}": {json.dumps(count(name)._asdict())}' for name in VARIANTS]
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write()
