"""Kernels for GPUs, in Triton.

- ``attention`` computes attentions and their gradients.
- ``mixing`` mixes kernels, and computes the gradients of attentions and cells.

Nothing here is imported before a tensor on a GPU is computed. ``mmkw.ops.backend`` decides that.
"""
