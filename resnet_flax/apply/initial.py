"""The weights that training starts from, where a config names some."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from resnet_flax.data.class_names import reordering
from resnet_flax.errors import UserError
from resnet_flax.evaluation.pretrained import check_channels
from resnet_flax.models import VARIANTS, ResNet
from resnet_flax.weights.catalog import CATALOG
from resnet_flax.weights.loading import load


def starting_from(
    origin: str,
    model: ResNet,
    seed: int,
    *,
    channels: int,
    class_names: Sequence[str],
) -> tuple[Mapping[str, Any], str]:
    """The variables of given weights for a network, and what to say about them.

    Args:
      origin: the config's `init`.
      model: the network.
      seed: of a new head.
      channels: of the images.
      class_names: of the data.
    """
    if origin in VARIANTS:
        published = [name for name in CATALOG if name.partition(".")[0] == origin]
        such = f" such as {published[0]}," * bool(published)
        raise UserError(
            f"init={origin} is the name of a network, without weights; give the name of published "
            f"weights,{such} a weights file or a workdir"
        )
    found = load(origin, model=model, reset_head=True, seed=seed)
    check_channels(found.variables, channels, f"init={origin}", "data.channels=")
    variables, head = found.variables, ""
    order = reordering(class_names, found.class_names)
    if found.classes != model.num_classes:
        own = f"its head of {found.classes} classes" if found.classes else "the missing head"
        head = f"; {own} is replaced by a new one"
    elif order is not None:  # the same classes, so that an output stays that of its class
        params = variables["params"]
        outputs = jax.tree.map(lambda leaf: leaf[..., np.array(order)], params["head"])
        variables = {**variables, "params": {**params, "head": outputs}}
        head = "; its outputs are put in the order of the classes of the data"
    return variables, f"starting from {found.origin}{head}"
