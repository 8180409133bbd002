"""KernelWarehouse dynamic convolution for MMDetection and MMSegmentation."""

from .requirements import check_versions

check_versions()

from . import checkpoints as _checkpoints  # noqa: E402, F401  (installs the safe loader)
from .layers import (  # noqa: E402
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    set_temperature,
)
from .sharing import SharingPlan, convert  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    'KWConv1d',
    'KWConv2d',
    'KWConv3d',
    'KWLinear',
    'SharingPlan',
    '__version__',
    'convert',
    'set_temperature',
]
