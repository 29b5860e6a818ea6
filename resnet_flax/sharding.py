"""How arrays lie on devices. The only file that names a mesh axis."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import UserError

# Both axes share the batch; `fsdp` shares parameters and optimiser state as well.
DATA, FSDP = "data", "fsdp"


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` by `fsdp` devices, where -1 stands for all that the other leaves.

    Raises:
      UserError: the two numbers do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    asked = f"mesh.data={data}, mesh.fsdp={fsdp}"
    if data == -1:
        data = n // fsdp
    elif fsdp == -1:
        fsdp = n // data
    if data * fsdp != n:
        raise UserError(
            f"a mesh of {asked} does not fit {n} device{'s' * (n > 1)}; "
            "their product must be the number of devices (-1 takes the rest)"
        )
    grid = np.asarray(devices).reshape(data, fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The batch's axis is cut over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def for_state(state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a train state: one axis that `fsdp` divides is cut.

    Of a kernel its input channels, else the largest axis.

    Args:
      state: arrays or their shapes (`jax.eval_shape`).
      mesh: of the devices.
    """
    fsdp = mesh.shape[FSDP]

    def of(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or not divisible:
            return replicated(mesh)
        # Shares along the outputs are narrower than TPU's tiles of 128 sooner, and what is
        # narrower is reduced whole rather than scattered, see docs/decisions.md.
        inputs = len(leaf.shape) - 2
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        cut = inputs if inputs in divisible else largest
        spec = [FSDP if axis == cut else None for axis in range(len(leaf.shape))]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, state)


def gather(params: Any, mesh: Mesh) -> Callable[[Any], Any]:
    """For the forward pass: a function that gathers parameters, and scatters their gradients.

    Said explicitly, as the compiler may else move features between devices where a parameter is
    cut along an axis that it sums over.

    Args:
      params: shardings of the parameters, see `for_state`.
      mesh: of the devices.
    """
    if mesh.shape[FSDP] == 1:
        return lambda params: params

    @jax.custom_vjp
    def gathered(values: Any) -> Any:
        return jax.lax.with_sharding_constraint(values, replicated(mesh))

    def forward(values: Any) -> tuple[Any, None]:
        return gathered(values), None

    def backward(_: None, gradients: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(gradients, params),)

    gathered.defvjp(forward, backward)
    return gathered


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """The global batch on the devices, from this process's share of it."""
    return _put(batch, over_batch(mesh, axis))


def put_whole(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays on every device; each process has them whole."""
    return _put(arrays, replicated(mesh))


def _put(arrays: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
    }
