"""Backbones with KernelWarehouse: a static network plus the paper's rule."""

from .convnext import ConvNeXt, KWConvNeXt
from .mobilenet_v2 import KWMobileNetV2, MobileNetV2
from .resnet import KWResNet, KWResNetV1c, KWResNetV1d, ResNet

__all__ = [
    'ConvNeXt',
    'KWConvNeXt',
    'KWMobileNetV2',
    'KWResNet',
    'KWResNetV1c',
    'KWResNetV1d',
    'MobileNetV2',
    'ResNet',
]
