"""The CIFAR networks in torch, of which nothing else is needed."""

from typing import Any

import torch
from torch import nn


class CifarBlock(nn.Module):
    """The block of akamaster/pytorch_resnet_cifar10, option A, written again."""

    def __init__(self, channels: int, features: int, strides: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, strides, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.strides, self.extra = strides, features - channels

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.strides > 1:
            half = self.extra // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return torch.relu(y + x)


class Cifar(nn.Module):
    """6n+2 layers."""

    def __init__(self, n: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, features in enumerate((16, 32, 64), start=1):
            blocks = []
            for i in range(n):
                blocks.append(CifarBlock(channels, features, 2 if stage > 1 and i == 0 else 1))
                channels = features
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
