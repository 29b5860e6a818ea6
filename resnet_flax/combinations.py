"""Which values of config keys go together."""

from typing import Any

from resnet_flax.errors import UserError


def check_combinations(flat: dict[str, Any]) -> None:
    """Checks that involve more than one key."""
    if flat["mesh.data"] == flat["mesh.fsdp"] == -1:
        raise UserError("only one of mesh.data and mesh.fsdp can be -1; give the other as a number")
    span = flat["model.bn_group_size"]
    if span.isdecimal() and flat["batch_size"] % int(span):
        raise UserError(
            f"batch_size={flat['batch_size']} must be a multiple of model.bn_group_size={span}, "
            "the examples that batch normalisation averages over"
        )
    batch, parts = flat["batch_size"], flat["accumulation"]
    if batch % parts:
        raise UserError(f"batch_size={batch} must be a multiple of accumulation={parts}")
    if span.isdecimal() and batch // parts % int(span):
        raise UserError(
            f"batch_size={batch} in accumulation={parts} parts must give complete groups of "
            f"model.bn_group_size={span} examples in each"
        )
    _check_data(flat)
    if flat["optim.warmup_steps"] >= flat["steps"]:
        raise UserError(
            f"optim.warmup_steps={flat['optim.warmup_steps']} must be less than "
            f"steps={flat['steps']}"
        )


def _check_data(flat: dict[str, Any]) -> None:
    """Checks that involve more than one key of `data`."""
    size, crop = flat["data.size"], flat["data.crop"]
    if crop != "none" and not size:
        raise UserError(f"data.crop={crop} needs data.size, the side of the training images")
    if size and crop == "none":
        raise UserError(
            f"data.size={size} needs data.crop, which makes training images of that side: jitter "
            "or random_resized"
        )
    largest = max(size, *flat["data.early_sizes"], 0)
    if crop == "jitter" and largest > flat["data.jitter"][0]:
        raise UserError(
            f"data.size and data.early_sizes, {largest} at most, are more than the shorter sides "
            f"of data.jitter={flat['data.jitter']}"
        )
    if any(type(side) is not int for side in flat["data.jitter"]):
        raise UserError(f"data.jitter must be whole numbers, not {flat['data.jitter']!r}")
    sizes, steps = flat["data.early_sizes"], flat["data.early_steps"]
    if len(sizes) != len(steps) or (sizes and crop == "none"):
        raise UserError(
            "data.early_sizes and data.early_steps need the same number of entries, and data.crop"
        )
    if flat["data.resident"] and (crop != "none" or flat["data.policy"] != "none"):
        raise UserError(
            "data.resident needs images of one size that are augmented on the device only: "
            "data.crop=none and data.policy=none"
        )
    if flat["steps_per_dispatch"] > 1 and not flat["data.resident"]:
        raise UserError("steps_per_dispatch needs data.resident=True")
    if flat["data.pixel_mean"] and any(flat["data.mean"]):
        raise UserError("data.pixel_mean replaces data.mean, which must be 0")
    if flat["data.pixel_mean"] and (sizes or flat["data.eval_size"] not in (0, size)):
        raise UserError(
            "data.pixel_mean needs images of one size: no data.early_sizes, and data.eval_size=0"
        )
    if flat["data.eval_split"] == "holdout" and not flat["data.holdout"]:
        raise UserError("data.eval_split=holdout needs data.holdout, part of data.train_split")
    if flat["batch_size"] % flat["data.repeats"]:
        raise UserError(
            f"batch_size={flat['batch_size']} must be a multiple of "
            f"data.repeats={flat['data.repeats']}"
        )
