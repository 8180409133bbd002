"""Backbones with KernelWarehouse, and a wrapper for any other network."""

from .. import registry  # noqa: F401  (Says which library is missing.)
from .convnext import ConvNeXt, KWConvNeXt
from .mobilenet_v2 import KWMobileNetV2, MobileNetV2
from .published import rewrite_published
from .resnet import KWResNet, KWResNetV1c, KWResNetV1d, ResNet
from .wrapper import KWBackbone, KWModule

__all__ = [
    'ConvNeXt',
    'KWBackbone',
    'KWConvNeXt',
    'KWMobileNetV2',
    'KWModule',
    'KWResNet',
    'KWResNetV1c',
    'KWResNetV1d',
    'MobileNetV2',
    'ResNet',
    'rewrite_published',
]
