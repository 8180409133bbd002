"""Dynamic layers, their attention and the warehouses that hold their cells."""

from .attention import Attention, LayerAttention, set_temperature, temperature_at
from .comparators import CondConv2d, DYConv2d, ODConv2d
from .dynamic_layers import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    dynamic_class,
    kernel_shape,
)
from .integers import quantize_cells
from .partition import (
    KernelShape,
    LayerShare,
    PlanError,
    WarehouseOptions,
    WarehousePartition,
    partition_warehouse,
    split_options,
)
from .twins import StandsForStatic, StaticTwins, leave_static_twins, static_twins
from .warehouse import WarehouseManager, fault_of
from .warm_start import check_start_tau, warm_start

__all__ = [
    'Attention',
    'CondConv2d',
    'DYConv2d',
    'KWConv1d',
    'KWConv2d',
    'KWConv3d',
    'KWLinear',
    'KernelShape',
    'LayerAttention',
    'LayerShare',
    'ODConv2d',
    'PlanError',
    'StandsForStatic',
    'StaticTwins',
    'WarehouseManager',
    'WarehouseOptions',
    'WarehousePartition',
    'check_start_tau',
    'dynamic_class',
    'fault_of',
    'kernel_shape',
    'leave_static_twins',
    'partition_warehouse',
    'quantize_cells',
    'set_temperature',
    'split_options',
    'static_twins',
    'temperature_at',
    'warm_start',
]
