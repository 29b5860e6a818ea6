"""How arrays are sharded over devices. The only file that names a mesh axis."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import UserError

# The batch is sharded over both axes; parameters and optimiser state over `fsdp` only.
DATA, FSDP = "data", "fsdp"


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` by `fsdp` devices, where -1 means all devices that the other leaves.

    Raises:
      UserError: the product of the two is not the number of devices.
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
    """Every device has the complete array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The batch axis is sharded over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA, FSDP)))


def for_state(state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a train state, over one axis that `fsdp` divides.

    For a kernel that is its input channels, else the largest axis.

    Args:
      state: arrays or their shapes (`jax.eval_shape`).
      mesh: of the devices.
    """
    fsdp = mesh.shape[FSDP]

    def of(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, n in enumerate(leaf.shape) if n % fsdp == 0]
        if fsdp == 1 or not divisible:
            return replicated(mesh)
        # Shards along the outputs would sooner be narrower than a TPU's tiles of 128, and narrower
        # gradients are all-reduced rather than reduce-scattered, see docs/decisions.md.
        inputs = len(leaf.shape) - 2
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        cut = inputs if inputs in divisible else largest
        spec = [FSDP if axis == cut else None for axis in range(len(leaf.shape))]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, state)


def gather(params: Any, mesh: Mesh) -> Callable[[Any], Any]:
    """For the forward pass: a function that gathers parameters, and scatters their gradients.

    Without it the compiler may move features between devices instead, where a parameter is sharded
    along an axis that it sums over.

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
    """The global batch on the devices, from this process's part of it."""
    return _put(batch, over_batch(mesh, axis))


def put_shared(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays on the devices, of which every process has the same, whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(put, tree)


def put_whole(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The arrays, replicated on every device; each process has all of them."""
    return _put(arrays, replicated(mesh))


def put_number(number: int, mesh: Mesh) -> jax.Array:
    """A whole number, int32 `[]`, on every device: an argument of programs, put explicitly."""
    return put_whole({"number": np.array(number, np.int32)}, mesh)["number"]


def _put(arrays: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in arrays.items()
    }
