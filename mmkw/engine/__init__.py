"""Hooks, constructors of optimizers, files and tools for MMEngine's runner."""
