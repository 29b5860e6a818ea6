"""The compiled programs of a config, and random batches for them."""

from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from resnet_flax import sharding
from resnet_flax.apply import tables
from resnet_flax.apply.experiment import make_programs
from resnet_flax.config import load_config
from resnet_flax.evaluation.compile import jit
from resnet_flax.runtime import xla_options
from resnet_flax.training.programs import Programs

Shape = tuple[int, int, int]
# The last argument of every training step; one on a device takes no time to get there.
SEED = np.int32(0)


def config_of(path: str, settings: list[str]) -> ml_collections.ConfigDict:
    """A config file's config with settings changed, resolved.

    Args:
      path: PATH or PATH:VARIANT.
      settings: changes, each written 'key=value'.
    """
    config = load_config(path)
    tables.override(config, settings)
    return tables.check(config)


def config_of_network(
    network: str, batch: int, dtype: str, settings: list[str] | None = None
) -> ml_collections.ConfigDict:
    """The resolved config with which the speed of a network is measured."""
    # For the CIFAR networks the step includes the paper's augmentation.
    cifar = network.startswith("cifar")
    path = "configs/cifar10.py:resnet20" if cifar else "configs/imagenet.py:resnet50"
    named = [f"model.name={network}", f"batch_size={batch}", f"model.dtype={dtype}"]
    return config_of(path, [*named, *(settings or [])])


def programs_of(
    config: ml_collections.ConfigDict,
    classes: int,
    shape: Shape,
    devices: list[jax.Device] | None = None,
) -> tuple[Programs, Mesh]:
    """The programs that `train.py` would run, and the mesh that they are compiled for.

    Args:
      config: a resolved config.
      classes: number of classes of the data.
      shape: height, width and channels of an image.
      devices: the devices of the mesh; by default all.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    return make_programs(config, mesh, classes, shape)[1], mesh


def batch_shapes(batch: int, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the arrays of a batch."""
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


def for_one_gpu(function: Any) -> Any:
    """`jax.jit` for a program on a single GPU of the kind that `ops.gpu_kernels` are for."""
    return jit(function, xla_options.Options({}, single_gpu=True))
