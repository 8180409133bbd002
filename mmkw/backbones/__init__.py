"""Backbones with KernelWarehouse: a static network of mmdet or mmseg plus the paper's rule."""

from .resnet import KWResNet, ResNet

__all__ = ['KWResNet', 'ResNet']
