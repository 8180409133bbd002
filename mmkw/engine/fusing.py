"""Fuses BatchNorms into convolutions like mmcv, but respects dynamic layers.

This module is imported while mmcv is being imported, so it must not import mmcv.
"""

import sys
from types import ModuleType

from torch import nn


def take_place(theirs: ModuleType) -> None:
    """Replaces mmcv's ``fuse_conv_bn``.

    Args:
        theirs: The module ``mmcv.cnn.utils.fuse_conv_bn``.
    """
    walk = theirs.fuse_conv_bn

    def fuse_conv_bn(module: nn.Module) -> nn.Module:
        """Fuses BatchNorms into the static convolutions before them, for inference.

        mmcv takes the last ``nn.Conv2d`` before a BatchNorm among the children of a module. It
        ignores a dynamic layer between the two, and would fuse into the wrong convolution. A
        BatchNorm after a dynamic layer stays, because the cells also serve other layers.

        Args:
            module: Any network; changed in place.

        Returns:
            The same network.
        """
        # Imported here, because these modules import mmcv.
        from ..layers.dynamic_layers import DynamicLayer
        from ..ops.modes import BATCH_NORM

        before = None
        for name, child in module.named_children():
            if isinstance(child, BATCH_NORM):
                if before is not None:
                    convolution = getattr(module, before)
                    module._modules[before] = theirs._fuse_conv_bn(convolution, child)
                    module._modules[name] = nn.Identity()
                before = None
            elif isinstance(child, nn.Conv2d):
                before = name
            elif isinstance(child, DynamicLayer):
                before = None
            else:
                fuse_conv_bn(child)
        return module

    # Other modules may have imported the function by name. These references are replaced, too.
    for importer in list(sys.modules.values()):
        if getattr(importer, '__dict__', {}).get('fuse_conv_bn') is walk:
            importer.fuse_conv_bn = fuse_conv_bn  # type: ignore[attr-defined]
