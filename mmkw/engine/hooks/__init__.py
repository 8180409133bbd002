"""Hooks for MMEngine's runner."""

from .iteration_seed_hook import IterationSeedHook
from .temperature_hook import TemperatureHook

__all__ = ['IterationSeedHook', 'TemperatureHook']
