"""The torch networks of the cases; needs torch, torchvision and timm.

torchvision's and timm's compiled operators need not match the installed torch: none is used here,
and an empty module takes the place of what would register them.
"""

import sys
import types
import warnings
from typing import Any

import networks
import numpy as np

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import timm
    import torch
    from torch import nn
    from torch_cifar import Cifar
    from torchvision.models import resnet as tv

LAYERS = [2, 1, 1, 1]


def torch_network(name: str) -> nn.Module:
    """The torch network of a case, in float64."""
    n, layers = networks.CLASSES, LAYERS
    bottleneck, basic = timm.models.resnet.Bottleneck, timm.models.resnet.BasicBlock
    dilated = {"layers": [1, 1, 2, 2], "num_classes": n, "output_stride": 8}
    v2 = {
        "layers": layers,
        "num_classes": n,
        "conv_layer": timm.layers.create_conv2d,
        "norm_layer": timm.layers.BatchNormAct2d,
    }
    resnet = timm.models.resnet.ResNet
    se = {"attn_layer": "se"}
    make = {
        "resnet18": lambda: tv.ResNet(tv.BasicBlock, layers, n),
        "resnet50": lambda: tv.ResNet(tv.Bottleneck, layers, n),
        "resnet18 dilated": lambda: resnet(basic, **dilated),
        "resnet50d dilated": lambda: resnet(
            bottleneck, **dilated, stem_type="deep", stem_width=32, avg_down=True
        ),
        "resnetv2_18 dilated": lambda: timm.models.resnetv2.ResNetV2(
            **{**v2, **dilated, "channels": (64, 128, 256, 512), "basic": True, "bottle_ratio": 1.0}
        ),
        "resnet50 dilated": lambda: tv.ResNet(
            tv.Bottleneck, [1, 1, 2, 2], n, replace_stride_with_dilation=[False, True, True]
        ),
        "resnext50_32x4d": lambda: tv.ResNet(
            tv.Bottleneck, layers, n, groups=32, width_per_group=4
        ),
        "wide_resnet50_2": lambda: tv.ResNet(tv.Bottleneck, layers, n, width_per_group=128),
        "resnet50_v1": lambda: _paper_strides(tv.ResNet(tv.Bottleneck, layers, n)),
        "seresnet18": lambda: resnet(basic, layers, n, block_args=se),
        "seresnet50": lambda: resnet(bottleneck, layers, n, block_args=se),
        "seresnext50_32x4d": lambda: resnet(
            bottleneck, layers, n, cardinality=32, base_width=4, block_args=se
        ),
        "resnetv2_18": lambda: timm.models.resnetv2.ResNetV2(
            channels=(64, 128, 256, 512), basic=True, bottle_ratio=1.0, **v2
        ),
        "resnetv2_50": lambda: timm.models.resnetv2.ResNetV2(**v2),
        "cifar_resnet20": lambda: Cifar(3, n),
    }
    if name not in make:
        return timm.create_model(name, layers=tuple(layers), num_classes=n).double()
    return make[name]().double()


def _paper_strides(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, tv.Bottleneck) and module.conv2.stride == (2, 2):
            module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)
    return model


def load(model: nn.Module, arrays: dict[str, Any]) -> None:
    """Loads exported arrays; everything but the counters of batches must be there."""
    state = {k: torch.from_numpy(a.copy()) for k, a in arrays.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    missing = [key for key in result.missing_keys if "num_batches_tracked" not in key]
    assert not missing, missing


def outputs(model: nn.Module, images: Any) -> dict[str, np.ndarray]:
    """What every module gives for images, channels last, by the module's name."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            # Copied at once: what follows may work in place.
            array = output.detach().clone().numpy()
            found[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules()]
    model(channels_first(images))
    for handle in handles:
        handle.remove()
    return found


def block_name(path: str, layout: str) -> str:
    """Of one of our blocks, 'stage1_block2', the module's name there."""
    stage, block = path.removeprefix("stage").split("_block")
    if layout == "timm_v2":
        return f"stages.{int(stage) - 1}.blocks.{int(block) - 1}"
    return f"layer{stage}.{int(block) - 1}"


def channels_first(images: Any) -> Any:
    """NHWC numbers as an NCHW tensor."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
