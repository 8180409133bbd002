"""Freezes a warehouse with its layers, whenever those are frozen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers import WarehouseManager


class FreezeWithLayers:
    """Freezes every warehouse none of whose layers learns; a forward hook of a converted network.

    Networks freeze their stages when they are built, or each time they are set to training, and
    users freeze what they name: layers, not warehouses. A warehouse that was frozen so learns again
    when one of its layers does. One that was frozen by itself is left alone. In a head it is a hook
    of the attentions, too, which compute before cells are mixed.

    Args:
        manager: The network's warehouses.
        layers: Of each warehouse its dynamic layers.
    """

    def __init__(self, manager: WarehouseManager, layers: Sequence[Sequence[nn.Module]]) -> None:
        self._layers = layers
        self._manager = manager
        self._frozen: set[int] = set()

    def __call__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Looks at the layers before they compute, where gradients are wanted."""
        if not torch.is_grad_enabled():
            return
        weights = self._manager.weights
        for index, layers in enumerate(self._layers):
            learns = any(p.requires_grad for layer in layers for p in layer.attention.parameters())
            parameters = weights.parameters_of(index)
            frozen = not any(parameter.requires_grad for parameter in parameters)
            if not frozen and not learns:
                self._frozen.add(index)
            elif learns and index in self._frozen:
                self._frozen.discard(index)
            else:
                continue
            for parameter in parameters:
                parameter.requires_grad_(learns)
