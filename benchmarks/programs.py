"""A config's compiled programs, and batches of noise for them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.config import load_config, override, resolve
from resnet_flax.train.setup import Programs, compile_programs

Shape = tuple[int, int, int]


def programs_of(
    config: str, settings: list[str], classes: int, shape: Shape, mesh: Mesh | None = None
) -> Programs:
    """Those that `train.py` would run.

    Args:
      config: PATH or PATH:VARIANT.
      settings: 'key=value' each.
      classes: of the data.
      shape: height, width and channels of an image.
      mesh: default all devices.
    """
    made = load_config(config)
    override(made, settings)
    mesh = mesh or sharding.make_mesh()
    return compile_programs(resolve(made), mesh, classes, shape)


def batch_shapes(batch: int, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch."""
    return {
        "image": jax.ShapeDtypeStruct((batch, *shape), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
        "mask": jax.ShapeDtypeStruct((batch,), np.bool_),
    }


def noise(batch: int, shape: Shape, classes: int) -> dict[str, Any]:
    """A batch of random images and labels, on the host."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, *shape), np.uint8),
        "label": rng.integers(0, classes, batch).astype(np.int32),
        "mask": np.ones(batch, bool),
    }
