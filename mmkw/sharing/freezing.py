"""Freezes a warehouse while all its layers are frozen."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers import WarehouseManager

LOGGER = logging.getLogger('mmkw')


class FreezeWithLayers:
    """A forward pre-hook of a converted network: freezes warehouses whose layers are all frozen.

    Networks and users freeze layers, not warehouses, and they may do so at any time. A warehouse
    that was frozen with all its layers learns again when one of its layers learns. So it does where
    a whole network was frozen and then a part of it learns. Other warehouses that someone froze
    stay so, and all do after ``warehouse_manager.requires_grad_(False)``. The manager does the same
    when someone asks for the parameters of the network.

    Args:
        manager: Owner of the network's warehouses.
        layers: For each warehouse, its dynamic layers.
    """

    def __init__(self, manager: WarehouseManager, layers: Sequence[Sequence[nn.Module]]) -> None:
        self._layers = layers
        self._manager = manager
        self._frozen = {index for index in range(len(layers)) if not self._is_learning(index)}
        self._told: set[int] = set()

    def __call__(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Freezes and thaws warehouses before the forward pass, if gradients are enabled."""
        if torch.is_grad_enabled():
            self.follow()

    def is_followed(self, index: int) -> bool:
        """Whether a warehouse is as its layers are.

        Args:
            index: Of the warehouse.
        """
        learns = any(map(_learns, self._layers[index]))
        return learns == self._is_learning(index) == (index not in self._frozen)

    def follow(self) -> None:
        """Freezes and thaws warehouses as their layers are now."""
        wanted = [any(map(_learns, layers)) for layers in self._layers]
        if not self._manager.stays_frozen:
            self._look_at_others(wanted)
        for index, learns in enumerate(wanted):
            if not learns:
                # Nothing is noted again: a compiled network might be compiled anew.
                if index not in self._frozen:
                    self._frozen.add(index)
            elif index in self._frozen and not self._manager.stays_frozen:
                self._frozen.discard(index)
            else:
                continue
            if self._is_learning(index) != learns:
                for parameter in self._manager.weights.parameters_of(index):
                    parameter.requires_grad_(learns)

    def _look_at_others(self, wanted: Sequence[bool]) -> None:
        """Decides about warehouses that are frozen while layers learn, by someone else's hand.

        Who freezes a network and lets a part of it learn again means the kernels of this part, too.
        Then all cells are frozen, and some layers. Who means the cells freezes no layer.
        """
        indices = range(len(self._layers))
        others = [
            i for i in indices if wanted[i] and i not in self._frozen and not self._is_learning(i)
        ]
        # Integers have no parameters that could learn.
        others = [i for i in others if self._manager.weights.parameters_of(i)]
        if not others:
            return
        if not any(map(self._is_learning, indices)) and not all(
            _learns(layer) for layers in self._layers for layer in layers
        ):
            self._frozen.update(others)
            return
        for index in set(others) - self._told:
            self._told.add(index)
            LOGGER.info(
                f'Warehouse {self._manager.partitions[index].name!r} stays frozen, though layers '
                'of it learn. If they are to learn cells, too, let it: '
                'network.warehouse_manager.requires_grad_(True)'
            )

    def _is_learning(self, index: int) -> bool:
        return any(p.requires_grad for p in self._manager.weights.parameters_of(index))


def _learns(layer: Any) -> bool:
    return layer.learns_kernel


class FreezeBeforeMixing:
    """A forward pre-hook of an attention, which computes before the cells are mixed.

    For networks that compute by other methods than ``forward``.

    Args:
        freeze: Of the network.
        index: Of the attention's warehouse.
    """

    def __init__(self, freeze: FreezeWithLayers, index: int) -> None:
        self._freeze = freeze
        self._index = index

    def __call__(self, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Freezes and thaws if the warehouse is not as its layers are."""
        if torch.is_grad_enabled() and not self._freeze.is_followed(self._index):
            self._freeze.follow()


# Hooks that leave a network with its warehouses.
HOOKS = (FreezeWithLayers, FreezeBeforeMixing)
