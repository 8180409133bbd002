"""Fusing BatchNorms into convolutions as mmcv does, in its place: mmcv misses dynamic layers.

mmcv is being imported when this is, so nothing of it is imported here.
"""

import sys
from types import ModuleType

from torch import nn


def take_place(theirs: ModuleType) -> None:
    """Puts our walk over a network in the place of mmcv's.

    Args:
        theirs: The module ``mmcv.cnn.utils.fuse_conv_bn``.
    """
    walk = theirs.fuse_conv_bn

    def fuse_conv_bn(module: nn.Module) -> nn.Module:
        """Fuses BatchNorms into the static convolutions before them, for inference.

        mmcv takes the last ``nn.Conv2d`` before a BatchNorm among the children of a module. It does
        not know a dynamic layer between the two, and would fuse into the wrong convolution. A
        dynamic layer cannot take a BatchNorm in, since its cells serve other layers too: both stay.

        Args:
            module: Any network; changed in place.

        Returns:
            The same network.
        """
        # Not at the top: these import mmcv.
        from ..layers import KWConv2d
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
            elif isinstance(child, KWConv2d):
                before = None
            else:
                fuse_conv_bn(child)
        return module

    # Also where it has been imported by name.
    for importer in list(sys.modules.values()):
        if getattr(importer, '__dict__', {}).get('fuse_conv_bn') is walk:
            importer.fuse_conv_bn = fuse_conv_bn
