"""Directories of the Hugging Face hub: weights, and what timm or transformers say of them.

timm describes the network, its images and the names of its classes in `config.json`; transformers
describes the network and the classes there, and the images in `preprocessor_config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, first_line
from resnet_flax.models import VARIANTS, ResNet, create_model
from resnet_flax.runtime import storage
from resnet_flax.weights.description import Description, function_of
from resnet_flax.weights.files import INDEX

# In the order in which the hub's programs look for them.
_WEIGHTS = tuple(
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", INDEX)
)

_CONFIG, _IMAGES = "config.json", "preprocessor_config.json"

# Pillow's numbers.
_FILTERS = {2: "bilinear", 3: "bicubic"}

# From this side transformers' processor of ConvNeXt, which its ResNets use, no longer crops.
_WARPED = 384

Json = Mapping[str, Any]


def weights_in(directory: Path) -> Path | None:
    """The file of weights in a directory of the hub, or the index of several; None without any."""
    return next((directory / n for n in _WEIGHTS if storage.is_file(directory / n)), None)


def describe(directory: Path, classes: int) -> Description | None:
    """What a directory says of its weights; None without a `config.json`.

    Args:
      directory: see `weights_in`.
      classes: that the head of the weights is for.

    Raises:
      UserError: it is for a network or images that are not available here, or is damaged.
    """
    if not storage.exists(directory / _CONFIG):
        return None
    config = _read(directory / _CONFIG)
    images = _read(directory / _IMAGES) if storage.exists(directory / _IMAGES) else None
    try:
        if "architecture" in config:  # timm, also within transformers
            described = _of_timm(config, classes)
        elif config.get("model_type") == "resnet":
            described = _of_transformers(config, images, classes)
        else:
            kind = config.get("model_type", "an unknown type")
            raise ValueError(f"it is for a network of {kind!r}, not a ResNet of timm, transformers")
    except Exception as error:  # what is in it is not trusted: errors of all types
        raise UserError(
            f"{directory / _CONFIG} cannot be followed ({first_line(error)}); give the file of "
            f"weights itself, {weights_in(directory)}, and say what is needed by flags"
        ) from error
    if classes == 0:
        return described._replace(class_names=())
    if len(described.class_names) not in (0, classes):
        named = len(described.class_names)
        raise UserError(
            f"{directory / _CONFIG} names {named} classes, and the weights are for {classes}; "
            "correct its names, or remove them"
        )
    return described


def _of_timm(config: Json, classes: int) -> Description:
    name, settings = config["architecture"], config.get("pretrained_cfg", {})
    arguments = {"global_pool": config.get("global_pool", "avg"), **config.get("model_args", {})}
    usual = {"global_pool": "avg", "num_classes": classes, "in_chans": arguments.get("in_chans")}
    changed = [f"{key}={value}" for key, value in arguments.items() if usual.get(key) != value]
    if name not in VARIANTS or changed:
        # Others may have the same names and shapes, such as resnetblur50.
        raise ValueError(f"no network here is timm's {' with '.join([name, *changed])}")
    divisor = {"se_divisor": 8} if VARIANTS[name].get("se_ratio") else {}
    model = create_model(name, num_classes=classes, **divisor)
    names = config.get("label_names") or ()
    return Description(model, _images_of_timm(settings), _strings(names), function_of(model))


def _images_of_timm(settings: Json) -> Preprocessing | None:
    """The settings for evaluation, as in timm's own, which may differ from training's."""
    if not settings:
        return None
    mode = settings.get("crop_mode", "center")
    _, height, width = settings.get("test_input_size") or settings["input_size"]
    if mode != "center" or height != width:
        raise ValueError(f"crop_mode={mode!r} at {height} x {width} pixels is not available")
    return Preprocessing(
        height,
        settings.get("test_crop_pct") or settings["crop_pct"],
        settings["interpolation"],
        tuple(settings["mean"]),
        tuple(settings["std"]),
    )


def _of_transformers(config: Json, images: Json | None, classes: int) -> Description:
    needed = {"hidden_act": "relu", "downsample_in_first_stage": False}
    other = {key: config[key] for key in needed if config.get(key, needed[key]) != needed[key]}
    if other:
        said = ", ".join(f"{key}={value}" for key, value in other.items())
        raise ValueError(f"no network here has {said}")
    model = _resnet_of_transformers(config, classes)
    names = config.get("id2label") or {}
    names = _strings(names[str(number)] for number in range(len(names)))
    if names == tuple(f"LABEL_{number}" for number in range(len(names))):
        names = ()  # what transformers writes if there are none
    preprocessing = None if images is None else _images_of_transformers(images)
    return Description(model, preprocessing, names, function_of(model))


def _resnet_of_transformers(config: Json, classes: int) -> ResNet:
    """A network by transformers' `ResNetConfig`, whose defaults are ResNet-50's."""
    bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
    widths = config.get("hidden_sizes", (256, 512, 1024, 2048))
    return create_model(
        "resnet50",
        block="bottleneck" if bottleneck else "basic",
        stage_sizes=tuple(config.get("depths", (3, 4, 6, 3))),
        stage_features=tuple(width // 4 if bottleneck else width for width in widths),
        stem_features=config.get("embedding_size", 64),
        # The one is the paper's network, the other "v1.5".
        stride_on="1x1" if config.get("downsample_in_bottleneck") else "3x3",
        num_classes=classes,
    )


def _images_of_transformers(images: Json) -> Preprocessing:
    size = images.get("size")
    side = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if type(side) is not int or not images.get("do_resize", True):
        raise ValueError(f"{_IMAGES} has size={size}, and only a shortest_edge is available")
    if images.get("do_center_crop"):  # of CLIP, BiT and others, which resize to that size
        crop = images.get("crop_size", side)
        crop = crop["height"] if isinstance(crop, Mapping) else crop
        fraction = crop / side
    elif side >= _WARPED:
        raise ValueError(
            f"{_IMAGES} stretches images to {side} x {side} pixels, which is not available"
        )
    else:
        crop, fraction = side, images.get("crop_pct") or 224 / 256
    resample = images.get("resample", 3)
    if resample not in _FILTERS:
        raise ValueError(f"{_IMAGES} has resample={resample}, and only 2 and 3 are available")
    scaled = images.get("do_rescale", True), images.get("rescale_factor", 1 / 255)
    if not scaled[0] or abs(scaled[1] * 255 - 1) > 1e-6:
        raise ValueError(f"{_IMAGES} has rescale_factor={scaled[1]}, do_rescale={scaled[0]}")
    is_normalized = images.get("do_normalize", True)
    mean, std = (images["image_mean"], images["image_std"]) if is_normalized else ([0.0], [1.0])
    return Preprocessing(crop, fraction, _FILTERS[resample], tuple(mean), tuple(std))


def _read(file: Path) -> Json:
    found = storage.read_json(file)
    if found is None:
        raise UserError(f"{file} is damaged: it is not a JSON object; download it again")
    return dict(found)


def _strings(values: Any) -> tuple[str, ...]:
    names = tuple(values)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("the names of classes are not strings")
    return names
