"""Learning rates that decrease from the last layers of a ConvNeXt to the first ones."""

import re
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ...registry import OPTIM_WRAPPER_CONSTRUCTORS

_DOWNSAMPLE = re.compile(r'backbone\.downsample_layers\.(\d+)\.')
_BLOCK = re.compile(r'backbone\.stages\.(\d+)\.(\d+)\.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay for ConvNeXt, static or with KernelWarehouse.

    Layers have numbers, as in ConvNeXt's own detection recipe:

    - 0: the stem;
    - 1: stage 1;
    - 2: stage 2 with its downsampling;
    - 3 and more: stage 3 with its downsampling, three blocks per number;
    - ``num_layers``: stage 4 with its downsampling;
    - ``num_layers + 1``: everything after the backbone.

    The rate of a layer is the base rate times ``decay_rate ** (num_layers + 1 - layer)``. A
    warehouse takes the largest rate of its layers, as with every constructor. If ``custom_keys``
    gives an ``lr_mult``, the rate is the base rate times ``lr_mult``, whatever the layer:
    ``custom_keys=dict(warehouse_manager=dict(lr_mult=1.0))`` lets all warehouses learn at the base
    rate.

    ``paramwise_cfg`` takes ``num_layers`` (at least 4) and ``decay_rate`` (in (0, 1]), and also the
    keys of MMEngine's own constructor, such as ``norm_decay_mult``.

    Raises:
        ValueError: If ``num_layers`` or ``decay_rate`` is missing or out of range, or if the
            model's ``backbone`` is not a ConvNeXt.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.num_layers = self.paramwise_cfg.get('num_layers')
        self.decay_rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(self.num_layers, int) or self.num_layers < 4:
            raise ValueError(
                f'paramwise_cfg.num_layers must be an integer of at least 4, got {self.num_layers}.'
            )
        if not isinstance(self.decay_rate, (int, float)) or not 0 < self.decay_rate <= 1:
            raise ValueError(
                f'paramwise_cfg.decay_rate must be a number in (0, 1], got {self.decay_rate}.'
            )

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any
    ) -> None:
        """Adds one group per parameter, as MMEngine does, and scales the rates."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # The call without a prefix covers the whole model.
        layers = {p: self._layer(name) for name, p in module.named_parameters()}
        if min(layers.values()) > self.num_layers:
            raise ValueError(
                'LayerDecayConstructor found no ConvNeXt at `backbone` of this '
                f'{type(module).__name__}; for another backbone use the default constructor.'
            )
        for group in params:
            (parameter,) = group['params']
            # MMEngine keeps the settings of custom_keys in the group, so lr_mult shows a match.
            if parameter.requires_grad and 'lr_mult' not in group:
                scale = self.decay_rate ** (self.num_layers + 1 - layers[parameter])
                group['lr'] = group.get('lr', self.base_lr) * scale

    def _layer(self, name: str) -> int:
        if match := _DOWNSAMPLE.match(name):
            return (0, 2, 3, self.num_layers)[int(match[1])]
        if match := _BLOCK.match(name):
            stage, block = int(match[1]), int(match[2])
            return (1, 2, min(3 + block // 3, self.num_layers), self.num_layers)[stage]
        return self.num_layers + 1
