"""Backbones with KernelWarehouse: a static network of mmdet or mmseg plus the paper's rule."""

from .resnet import KWResNet

__all__ = ['KWResNet']
