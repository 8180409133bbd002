"""Learning rates that fall from the last layers of a ConvNeXt to the first."""

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

    Layers are counted as in ConvNeXt's own detection recipe: the stem is 0, the first stage 1, the
    second with its downsampling 2, the third 3 and on with three blocks each, the last one
    ``num_layers``, everything after the backbone ``num_layers + 1``. A layer's rate is the base
    rate times ``decay_rate ** (num_layers + 1 - layer)``. A warehouse that layers of different
    depth share takes the largest rate among them, as with every constructor. Where
    ``custom_keys`` gives an ``lr_mult``, the rate is the base rate times that, whatever the layer:
    ``custom_keys=dict(warehouse_manager=dict(lr_mult=1.0))`` lets all warehouses learn at the base
    rate.

    ``paramwise_cfg`` takes ``num_layers`` (at least 4) and ``decay_rate`` (in (0, 1]) beside what
    MMEngine's own constructor takes, such as ``norm_decay_mult``.

    Raises:
        ValueError: If ``num_layers`` or ``decay_rate`` is missing or out of range, or if the
            model's ``backbone`` is no ConvNeXt.
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
            return  # Only once, for the whole model.
        layers = {p: self._layer(name) for name, p in module.named_parameters()}
        if min(layers.values()) > self.num_layers:
            raise ValueError(
                'LayerDecayConstructor found no ConvNeXt at `backbone` of this '
                f'{type(module).__name__}; for another backbone use the default constructor.'
            )
        for group in params:
            (parameter,) = group['params']
            # MMEngine leaves the settings of custom_keys in the group.
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
