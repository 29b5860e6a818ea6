"""Directories of the Hugging Face hub: weights, and what timm or transformers say of them.

timm describes the network, its images and the names of its classes in `config.json`; transformers
describes the network and the classes there, and the images in `preprocessor_config.json`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resnet_flax.data.class_names import unusable
from resnet_flax.data.preprocessing import Preprocessing
from resnet_flax.errors import UserError, first_line, listed
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

# Arguments of timm's networks that only training needs.
_TRAINING = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")

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
    is_timm = "architecture" in config  # also within transformers
    with _explained(directory, _CONFIG):
        if not is_timm and config.get("model_type") != "resnet":
            kind = config.get("model_type", "an unknown type")
            raise ValueError(f"it is for a network of {kind!r}, not a ResNet of timm, transformers")
        described = (_of_timm if is_timm else _of_transformers)(config, classes)
    if not is_timm and storage.exists(directory / _IMAGES):
        images = _read(directory / _IMAGES)
        with _explained(directory, _IMAGES):
            described = described._replace(preprocessing=_images_of_transformers(images))
    if classes == 0:
        return described._replace(class_names=())
    if len(described.class_names) not in (0, classes):
        named = len(described.class_names)
        raise UserError(
            f"{directory / _CONFIG} names {named} classes, and the weights are for {classes}; "
            "correct its names, or remove them"
        )
    return described


@contextlib.contextmanager
def _explained(directory: Path, name: str) -> Iterator[None]:
    """A context in which an error means that a file cannot be followed: it is not trusted."""
    try:
        yield
    except Exception as error:  # of all types
        missing = isinstance(error, KeyError)
        why = f"it has no {error.args[0]}" if missing else first_line(error)
        raise UserError(
            f"{directory / name} cannot be followed ({why}); give the file of weights itself, "
            f"{weights_in(directory)}, and say what is needed by flags"
        ) from error


def _of_timm(config: Json, classes: int) -> Description:
    name = config["architecture"]
    if not isinstance(name, str):
        raise TypeError(f"its architecture is {name}, not a name")
    # Older versions have the settings of images beside those of the network.
    settings = config.get("pretrained_cfg") or (config if "input_size" in config else {})
    arguments = {"global_pool": config.get("global_pool", "avg"), **config.get("model_args", {})}
    kept = {key: value for key, value in arguments.items() if key not in _TRAINING}
    usual = {"global_pool": "avg", "num_classes": classes, "in_chans": arguments.get("in_chans")}
    changed = [f"{key}={value}" for key, value in kept.items() if usual.get(key) != value]
    if name not in VARIANTS or changed:
        # Others may have the same names and shapes, such as resnetblur50.
        raise ValueError(f"no network here is timm's {' with '.join([name, *changed])}")
    divisor = {"se_divisor": 8} if VARIANTS[name].get("se_ratio") else {}
    model = create_model(name, num_classes=classes, **divisor)
    names = config.get("label_names") or settings.get("label_names") or config.get("labels")
    return Description(model, _images_of_timm(settings), _names(names or ()), function_of(model))


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


def _of_transformers(config: Json, classes: int) -> Description:
    needed = {"hidden_act": "relu", "downsample_in_first_stage": False}
    other = {key: config[key] for key in needed if config.get(key, needed[key]) != needed[key]}
    if other:
        said = ", ".join(f"{key}={value}" for key, value in other.items())
        raise ValueError(f"no network here has {said}")
    model = _resnet_of_transformers(config, classes)
    names = _names(config.get("id2label") or {})
    if names == tuple(f"LABEL_{number}" for number in range(len(names))):
        names = ()  # what transformers writes if there are none
    return Description(model, None, names, function_of(model))


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
        raise ValueError(f"it has size={size}, and only a shortest_edge is available")
    if images.get("do_center_crop"):  # of CLIP, BiT and others, which resize to that size
        crop = images.get("crop_size", side)
        height, width = (
            (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
        )
        if height != width:
            raise ValueError(f"it crops to {height} x {width} pixels, which is not available")
        crop, fraction = height, height / side
    elif others := [name for name in _processors(images) if not name.startswith("ConvNext")]:
        raise ValueError(f"{listed(others)} without do_center_crop is not available")
    elif side >= _WARPED:
        raise ValueError(f"it stretches images to {side} x {side} pixels, which is not available")
    else:
        crop, fraction = side, images.get("crop_pct") or 224 / 256
    resample = images.get("resample", 3)
    if resample not in _FILTERS:
        raise ValueError(f"it has resample={resample}, and only 2 and 3 are available")
    scaled = images.get("do_rescale", True), images.get("rescale_factor", 1 / 255)
    if not scaled[0] or abs(scaled[1] * 255 - 1) > 1e-6:
        raise ValueError(f"it has rescale_factor={scaled[1]}, do_rescale={scaled[0]}")
    is_normalized = images.get("do_normalize", True)
    mean, std = (images["image_mean"], images["image_std"]) if is_normalized else ([0.0], [1.0])
    return Preprocessing(crop, fraction, _FILTERS[resample], tuple(mean), tuple(std))


def _processors(images: Json) -> list[str]:
    """The names of the class that prepares the images; transformers has had two keys for it."""
    kinds = (images.get(f"{kind}_type") for kind in ("image_processor", "feature_extractor"))
    return [str(name) for name in kinds if name]


def _read(file: Path) -> Json:
    found = storage.read_json(file)
    if found is None:
        raise UserError(f"{file} is damaged: it is not a JSON object; download it again")
    return dict(found)


def _names(values: Any) -> tuple[str, ...]:
    """The names of classes, from a list or by their numbers."""
    if isinstance(values, Mapping):
        numbers = [str(number) for number in range(len(values))]
        if set(numbers) != set(values):
            raise ValueError("the names of classes are not numbered from 0 without gaps")
        values = [values[number] for number in numbers]
    if not isinstance(values, list | tuple):
        raise TypeError("the names of classes are neither a list nor numbered")
    names = tuple(values)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("the names of classes are not strings")
    if any(map(unusable, names)):
        raise ValueError("names of classes with line breaks or control characters")
    return names
