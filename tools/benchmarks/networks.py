"""ResNet50 and ConvNeXt-T in plain PyTorch, for machines without OpenMMLab.

``mmkw.convert`` knows the families by the names of the classes.
"""

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A block of a ResNet: 1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, channels, *size]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """A ResNet50 without classifier (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            layers = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(channels, 64 << stage, stride))
                channels = 256 << stage
            self.add_module(f'layer{stage + 1}', nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, 3, height, width] to Tensor[batch, 2048, height / 32, width / 32]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, channels, *size]."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A block of a ConvNeXt: a depthwise convolution and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, channels, *size]."""
        y = self.norm(self.depthwise_conv(x).movedim(1, -1))
        y = self.gamma * self.pointwise_conv2(self.act(self.pointwise_conv1(y)))
        return x + y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """A ConvNeXt-T without classifier (Liu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (96, 192, 384, 768)
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        before = 3
        for width, blocks in zip(widths, (3, 3, 9, 3)):
            if before == 3:
                layers = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width, eps=1e-6)]
            else:
                layers = [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, 2)]
            self.downsample_layers.append(nn.Sequential(*layers))
            self.stages.append(nn.Sequential(*(Block(width) for _ in range(blocks))))
            before = width

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, 3, height, width] to Tensor[batch, 768, height / 32, width / 32]."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return x


NETWORKS: dict[str, type[nn.Module]] = {'R50': ResNet, 'ConvNeXt-T': ConvNeXt}
