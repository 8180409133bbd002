"""Fuses the BatchNorms of Ultralytics' networks, but respects dynamic layers.

This module is imported while Ultralytics is being imported, so it must not import that.
"""

from types import ModuleType

from torch import nn


def take_place(theirs: ModuleType) -> None:
    """Replaces the function with which Ultralytics' networks fuse a BatchNorm into a convolution.

    Args:
        theirs: The module ``ultralytics.nn.tasks``.
    """
    fuse = theirs.fuse_conv_and_bn

    def fuse_conv_and_bn(conv: nn.Module, bn: nn.Module) -> nn.Module:
        """Fuses a BatchNorm into a static convolution, for inference.

        A BatchNorm after a dynamic layer stays, because the cells also serve other layers.

        Args:
            conv: A convolution, static or dynamic.
            bn: The BatchNorm after it.

        Returns:
            A module that computes both.
        """
        from ..layers.dynamic_layers import DynamicLayer

        return nn.Sequential(conv, bn) if isinstance(conv, DynamicLayer) else fuse(conv, bn)

    theirs.fuse_conv_and_bn = fuse_conv_and_bn  # type: ignore[attr-defined]
