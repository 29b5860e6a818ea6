"""Standard deviations of layer responses (He et al. 2015, figure 7)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from resnet_flax.data.pipeline import eval_batches
from resnet_flax.data.sources import Source
from resnet_flax.errors import UserError
from resnet_flax.evaluation.multi_view import Network
from resnet_flax.models.layers import BatchNorm
from resnet_flax.models.scan import unstack


def responses(network: Network, source: Source, *, batch_size: int = 100) -> list[float]:
    """Standard deviations after each 3x3 convolution's normalisation, before addition or ReLU.

    Over all images, positions and channels, in evaluation mode.

    Args:
      network: with batch normalisation.
      source: images.
      batch_size: affects rounding only.

    Returns:
      The standard deviations, from the first layer to the last.

    Raises:
      UserError: the network has no batch normalisation.
    """
    model, variables, preprocessing = network
    if model.norm != "batch":
        raise UserError("layer responses need batch normalisation; give a network that has it")
    if model.scan:
        model, variables = model.clone(scan=False), unstack(variables)

    wanted = _norms(variables["params"])

    @jax.jit
    def moments(variables: Any, images: Any, mask: Any) -> Any:
        _, state = model.apply(
            variables,
            preprocessing.normalize(images, model.dtype),
            train=False,
            capture_intermediates=_is_norm,
            mutable=["intermediates"],
        )
        outputs = flatten_dict(state["intermediates"])
        found = []
        for path in wanted:
            (y,) = outputs[(*path, "__call__")]
            y = jnp.where(mask[:, None, None, None], y.astype(jnp.float32), 0)
            found.append(jnp.stack([y.mean((1, 2, 3)).sum(), (y**2).mean((1, 2, 3)).sum()]))
        return jnp.stack(found)

    total = np.zeros((len(wanted), 2))
    with eval_batches(source, batch_size=batch_size, transform=preprocessing.transform) as batches:
        for batch in batches:
            total += np.asarray(moments(variables, batch["image"], batch["mask"]), np.float64)
    mean, square = total.T / len(source)
    return np.sqrt(square - mean**2).tolist()


def _is_norm(module: Any, method: str) -> bool:
    """Whether this is the call of a normalisation; its other methods return parameters."""
    return isinstance(module, BatchNorm) and method == "__call__"


def _norms(params: Any) -> list[tuple[str, ...]]:
    """Paths of the normalisations after 3x3 convolutions, in the order of the network."""
    kernels = flatten_dict(params)
    convs = [
        path[:-1]
        for path, kernel in kernels.items()
        if path[-1] == "kernel" and kernel.ndim == 4 and kernel.shape[:2] == (3, 3)
    ]
    norms = [(*path[:-1], path[-1].replace("conv", "norm")) for path in convs]

    def place(path: tuple[str, ...]) -> tuple[Any, ...]:
        return path[0] != "stem", *map(int, re.findall(r"\d+", "/".join(path)))

    return sorted((path for path in norms if (*path, "scale") in kernels), key=place)
