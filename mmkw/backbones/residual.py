"""Drop path and activation checkpointing for residual blocks written for static layers."""

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BranchDropPath(DropPath):
    """mmcv's DropPath, as a forward hook of the last module of a residual branch."""

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Drops the branch for random images while training."""
        return self.forward(output)


def drop_path_rates(rate: float | Sequence[float], blocks: int) -> list[float]:
    """The rate of every block.

    Args:
        rate: The rate of the last block, in [0, 1). The rates grow linearly from 0 at the first
            block. Or a sequence with one rate per block.
        blocks: Number of blocks.

    Raises:
        ValueError: If a rate is out of range, or if a sequence does not have one rate per block.
        TypeError: If a rate is not a number.
    """
    several = isinstance(rate, Sequence) and not isinstance(rate, str)
    rates: Any = rate if several else [rate]
    for value in rates:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(
                f'drop_path_rate must be a number, or one for every block, got {rate!r}.'
            )
        if not 0 <= float(value) < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {value!r}.')
    if not several:
        return [rates[0] * index / max(blocks - 1, 1) for index in range(blocks)]
    if len(rates) != blocks:
        raise ValueError(f'drop_path_rate has {len(rates)} values, the network {blocks} blocks.')
    return list(rates)


def add_drop_path(blocks: Sequence[nn.Module], rate: float | Sequence[float]) -> None:
    """Drops the residual branches of blocks while training.

    Args:
        blocks: Residual blocks like those of mmdet's and mmseg's ResNet. The branch ends with
            ``norm2`` or ``norm3``, or with the last ``after_conv3`` plugin.
        rate: As in :func:`drop_path_rates`.

    Raises:
        ValueError: If a rate is out of range, or if a sequence does not have one rate per block.
        TypeError: If a rate is not a number.
    """
    rates = drop_path_rates(rate, len(blocks))
    if not any(rates):
        return
    for block, probability in zip(blocks, rates):
        if hasattr(block, 'drop_path'):
            # mmpretrain's blocks call it themselves.
            block.drop_path = DropPath(probability)
            continue
        plugins = getattr(block, 'after_conv3_plugin_names', None)
        norm = 'norm3' if hasattr(block, 'norm3') else 'norm2'
        branch_end = getattr(block, plugins[-1] if plugins else norm)
        # As a submodule of the block, it is set by train() and eval().
        block.drop_path = BranchDropPath(probability)
        branch_end.register_forward_hook(block.drop_path)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Recomputes the activations of blocks in the backward pass.

    The blocks' own ``with_cp`` runs a separate backward pass for every block. Each of them would
    mark a shared warehouse as ready, which DistributedDataParallel refuses. Here the recomputation
    is part of one backward pass.

    Args:
        blocks: Modules whose first input is a tensor and whose output is a tensor.
    """
    for block in blocks:
        block.forward = partial(_checkpointed_forward, block)


def take_over_checkpoints(network: nn.Module) -> None:
    """Replaces the ``with_cp`` of a network's blocks by :func:`checkpoint_blocks`.

    Args:
        network: A network. The blocks of mmdet and mmseg have an attribute ``with_cp``.
    """
    asking = [module for module in network.modules() if getattr(module, 'with_cp', False)]
    # Networks and stages also have with_cp, and pass it to their blocks. Only the blocks count.
    blocks = [
        module for module in asking if not any(m in asking for m in list(module.modules())[1:])
    ]
    for block in blocks:
        block.with_cp = False
    checkpoint_blocks(blocks)


def _checkpointed_forward(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    forward = type(block).forward
    if not x.requires_grad:
        return forward(block, x, *args, **kwargs)
    return checkpoint(forward, block, x, *args, use_reentrant=False, **kwargs)
