"""What residual blocks need that were written for static layers: drop path and checkpointing."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class BranchDropPath(DropPath):
    """mmcv's DropPath as a forward hook of the module that ends a residual branch."""

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        """Drops the branch of whole images while training."""
        return self.forward(output)


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """Rates that grow linearly from 0 at the first block to ``rate`` at the last.

    Args:
        rate: In [0, 1).
        blocks: Number of blocks.

    Raises:
        ValueError: If ``rate`` is out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {rate!r}.')
    return [rate * index / max(blocks - 1, 1) for index in range(blocks)]


def add_drop_path(blocks: Sequence[nn.Module], rate: float) -> None:
    """Drops the residual branches of blocks, from rate 0 at the first to ``rate`` at the last.

    Args:
        blocks: Residual blocks in the style of mmdet's and mmseg's ResNet: ``norm2`` or ``norm3``
            ends the branch, or the last ``after_conv3`` plugin.
        rate: Probability for the last block, in [0, 1).

    Raises:
        ValueError: If ``rate`` is out of range.
    """
    rates = drop_path_rates(rate, len(blocks))
    if rate == 0:
        return
    for block, probability in zip(blocks, rates):
        plugins = getattr(block, 'after_conv3_plugin_names', None)
        norm = 'norm3' if hasattr(block, 'norm3') else 'norm2'
        branch_end = getattr(block, plugins[-1] if plugins else norm)
        # A submodule of the block, so that train() and eval() reach it.
        block.drop_path = BranchDropPath(probability)
        branch_end.register_forward_hook(block.drop_path)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Recomputes the activations of blocks in the backward pass.

    The blocks' own ``with_cp`` runs a backward pass of its own for every block. That would mark a
    warehouse ready once a block, and DistributedDataParallel refuses; here the recomputation is
    part of the one backward pass.

    Args:
        blocks: Modules that take a tensor, and what else they like, and give one.
    """
    for block in blocks:
        block.forward = partial(_checkpointed_forward, block)


def take_over_checkpoints(network: nn.Module) -> None:
    """Lets :func:`checkpoint_blocks` do what the ``with_cp`` of a network's blocks would.

    Args:
        network: Its blocks, in the style of mmdet and mmseg, have an attribute ``with_cp``.
    """
    asking = [module for module in network.modules() if getattr(module, 'with_cp', False)]
    # Networks and stages hand the wish to their blocks.
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
