"""The named networks, as arguments of `ResNet`. Importing this table imports no JAX."""

from typing import Any

Overrides = dict[str, Any]

# He et al. 2015, table 1.
SIZES = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
# Further depths of timm.
_TIMM_SIZES = {26: ("bottleneck", (2, 2, 2, 2)), 200: ("bottleneck", (3, 24, 36, 3))}


def _imagenet(depth: int, **overrides: Any) -> Overrides:
    block, sizes = (SIZES | _TIMM_SIZES)[depth]
    return {"block": block, "stage_sizes": sizes, **overrides}


def _cifar(depth: int, **overrides: Any) -> Overrides:
    """Section 4.2: three stages of 16, 32 and 64 channels on a 3x3 stem.

    Two or, for bottlenecks, three layers per block, plus stem and head.
    """
    layers = 9 if overrides.get("block") == "bottleneck" else 6
    return {
        "stage_sizes": ((depth - 2) // layers,) * 3,
        "stage_features": (16, 32, 64),
        "stem_features": 16,
        "stem": "cifar",
        "num_classes": 10,
        **overrides,
    }


_SE = {"se_ratio": 16}
_NEXT = {"groups": 32, "width_per_group": 4}
_V2 = {"preactivation": True, "stem_norm": False}
_DEEP = {"stem": "deep"}
_D = {**_DEEP, "avg_down": True}

VARIANTS: dict[str, Overrides] = {
    # He et al. 2015; the stride in bottlenecks as in torchvision and timm ("v1.5").
    **{f"resnet{d}": _imagenet(d) for d in SIZES},
    "resnet26": _imagenet(26),
    # The stride as in the paper.
    **{f"resnet{d}_v1": _imagenet(d, stride_on="1x1") for d in (50, 101, 152)},
    **{
        f"resnet{d}_{option.lower()}": _imagenet(d, shortcut=option)
        for d in (18, 34)
        for option in "ABC"
    },
    **{f"plain{d}": _imagenet(d, shortcut="none") for d in (18, 34)},
    # He et al. 2016, "Identity Mappings in Deep Residual Networks"; the stem as in timm.
    **{f"resnetv2_{d}": _imagenet(d, **_V2) for d in SIZES},
    **{f"resnetv2_{d}d": _imagenet(d, **_V2, **_D) for d in (18, 34)},
    # Xie et al. 2017.
    "resnext50_32x4d": _imagenet(50, **_NEXT),
    "resnext101_32x4d": _imagenet(101, **_NEXT),
    **{f"resnext101_32x{d}d": _imagenet(101, groups=32, width_per_group=d) for d in (8, 16, 32)},
    "resnext101_64x4d": _imagenet(101, groups=64, width_per_group=4),
    # Zagoruyko and Komodakis 2016.
    **{f"wide_resnet{d}_2": _imagenet(d, width_per_group=128) for d in (50, 101)},
    # Hu et al. 2018.
    **{f"seresnet{d}": _imagenet(d, **_SE) for d in SIZES},
    **{f"seresnext{d}_32x4d": _imagenet(d, **_NEXT, **_SE) for d in (50, 101)},
    "seresnext101_32x8d": _imagenet(101, groups=32, width_per_group=8, **_SE),
    "seresnext101_64x4d": _imagenet(101, groups=64, width_per_group=4, **_SE),
    # He et al. 2018, "Bag of Tricks": ResNet-D with the deep stem; "c" has the stem alone, and "s",
    # as in timm, one of twice as many channels.
    **{f"resnet{d}d": _imagenet(d, **_D) for d in (*SIZES, 26, 200)},
    **{f"resnet{d}c": _imagenet(d, **_DEEP) for d in (50, 101, 152)},
    **{f"resnet{d}s": _imagenet(d, **_DEEP, stem_features=128) for d in (50, 101, 152)},
    "resnext50d_32x4d": _imagenet(50, **_NEXT, **_D),
    "seresnet152d": _imagenet(152, **_SE, **_D),
    "seresnext26d_32x4d": _imagenet(26, **_NEXT, **_SE, **_D),
    "seresnext101d_32x8d": _imagenet(101, groups=32, width_per_group=8, **_SE, **_D),
    # Wu and He 2018.
    "resnet50_gn": _imagenet(50, norm="group"),
    "resnetv2_50d_gn": _imagenet(50, **_V2, **_D, norm="group"),
    # The depths of table 6, and 8 for quick looks.
    **{f"cifar_resnet{d}": _cifar(d, shortcut="A") for d in (8, 20, 32, 44, 56, 110, 1202)},
    **{f"cifar_plain{d}": _cifar(d, shortcut="none") for d in (8, 20, 32, 44, 56, 110)},
    # With projections, as chenyaofo/pytorch-cifar-models and many others have them.
    **{f"cifar_resnet{d}_b": _cifar(d, shortcut="B") for d in (20, 32, 44, 56, 110)},
    "cifar_resnetv2_110": _cifar(110, **_V2),
    **{
        f"cifar_resnetv2_{d}": _cifar(d, **_V2, block="bottleneck", stride_on="1x1")
        for d in (164, 1001)
    },
    "wrn28_10": _cifar(26, **_V2, stage_features=(160, 320, 640)),
    # The networks for ImageNet on a stem for small images, as in kuangliu/pytorch-cifar.
    **{f"resnet{d}_cifar": _imagenet(d, stem="cifar", num_classes=10) for d in SIZES},
}
