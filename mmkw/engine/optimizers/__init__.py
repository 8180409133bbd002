"""Optimizer constructors for MMEngine."""

from .layer_decay import LayerDecayConstructor

__all__ = ['LayerDecayConstructor']
