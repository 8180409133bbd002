"""Freezes a warehouse while all its layers are frozen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers import WarehouseManager


class FreezeWithLayers:
    """A forward pre-hook of a converted network: freezes warehouses whose layers are all frozen.

    Networks and users freeze layers, not warehouses, and they may do so at any time. A warehouse
    that this hook has frozen learns again when one of its layers learns. This hook does not change
    a warehouse that someone else has frozen. In a head the attentions have this hook, too: they
    compute before cells are mixed.

    Args:
        manager: Owner of the network's warehouses.
        layers: For each warehouse, its dynamic layers.
    """

    def __init__(self, manager: WarehouseManager, layers: Sequence[Sequence[nn.Module]]) -> None:
        self._layers = layers
        self._manager = manager
        self._frozen: set[int] = set()

    def __call__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Freezes and unfreezes warehouses before the forward pass, if gradients are enabled."""
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
