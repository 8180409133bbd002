"""Convolution and linear map with one kernel per image of the batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backend, choosing, modes
from .memory import Scratch
from .ways import Geometry, Groups, Images, Products, Tiles, Way, with_bias

_WAYS: dict[str, type[Way]] = dict(images=Images, groups=Groups, tiles=Tiles)


@dataclass(frozen=True)
class SampleConv(Geometry):
    """Convolves every image with its own kernel.

    For kernels of size one without padding, a batched product of matrices computes the result.
    Others are convolved one image after the other, by one convolution with the groups of all
    images, or on a GPU by a kernel of our own. There the fastest is found by measurement, for every
    kind of shape; see :mod:`.choosing`.

    Args:
        stride: Stride, one value per spatial dimension.
        padding: Padding, one value per spatial dimension.
        dilation: Dilation, one value per spatial dimension.
        groups: Groups of one image's convolution.
    """

    channel_dim = 1

    def __call__(self, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolves. Autograd can differentiate the result.

        Args:
            x: Tensor[batch, in_channels, *size] with one, two or three spatial dimensions. The
                batch may be empty.
            kernels: Tensor[batch, out_channels, in_channels / groups, *kernel_size].
            bias: Tensor[out_channels], shared by the images.

        Returns:
            Tensor[batch, out_channels, *output_size].

        Raises:
            ValueError: If there are not as many kernels as images.
        """
        batch = x.shape[0]
        if not modes.is_exporting() and len(kernels) != batch:
            raise ValueError(f'{batch} images have {len(kernels)} kernels, not one each.')
        if batch <= 1 and not modes.is_exporting() and not self.is_pointwise(kernels):
            # One image is an ordinary convolution. Without images, a sum gives a kernel of zeros.
            return self.convolve(x, kernels[0] if batch else kernels.sum(0), bias, self.groups)
        return self._by_best_way('forward', x, kernels, x, kernels, bias)

    def one(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolves all images with one kernel.

        Args:
            x: Tensor[batch, in_channels, *size].
            kernel: Tensor[out_channels, in_channels / groups, *kernel_size].
        """
        return self.convolve(x, kernel, None, self.groups)

    def backward_kernels(
        self, grad: Tensor, x: Tensor, shape: tuple[int, ...], scratch: Scratch
    ) -> Tensor | Sequence[Tensor]:
        """The gradient of every image's kernel, as a constant.

        The result is valid only until the next call, which may use the same memory.

        Args:
            grad: Gradient of the result of the forward call.
            x: The images of the forward call.
            shape: ``(out_channels, in_channels / groups, *kernel_size)``.
            scratch: Memory for the result.
        """
        # Only the shape of the kernels is used.
        kernels = x.new_empty(x.shape[0], *shape)
        return self._by_best_way('kernels', x, kernels, grad, x, kernels, scratch)

    def backward_x(self, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the images, as a constant.

        Args:
            grad: Gradient of the result of the forward call.
            x: The images of the forward call.
            kernels: The kernels of the forward call.
        """
        return self._by_best_way('x', x, kernels, grad, x, kernels)

    def _by_best_way(self, what: str, x: Tensor, kernels: Tensor, *operands: Any) -> Any:
        """Computes one of the methods of a way."""
        if self.is_pointwise(kernels):
            return getattr(Products, what)(self, *operands)
        return getattr(self._way(what, x, kernels, operands), what)(self, *operands)

    def _way(self, what: str, x: Tensor, kernels: Tensor, operands: Sequence[Any]) -> type[Way]:
        """The way for kernels larger than one."""
        way = 'groups' if self._is_joined(x, kernels.shape[1:]) else 'images'
        if choosing.may_choose(x) and not modes.is_seen_through(x, kernels):
            recorded = torch.is_grad_enabled() and any(
                isinstance(operand, Tensor) and operand.requires_grad for operand in operands
            )
            kind = self._kind(what, kernels.shape[1:], recorded)
            way = choosing.chosen(kind, x) or choosing.choose(
                kind, x, way, self._ways(what, x, operands, recorded)
            )
        return _WAYS[way]

    def _ways(
        self, what: str, x: Tensor, operands: Sequence[Any], recorded: bool
    ) -> dict[str, Callable[[], Any]]:
        """What computes one of the methods, by the name of the way."""
        return {
            name: partial(getattr(way, what), self, *operands)
            for name, way in _WAYS.items()
            # Kernels of our own give autograd nothing to record.
            if way is not Tiles or (self._fits_tiles(x) and not recorded)
        }

    def wants_channels_last(self, x: Tensor, shape: Sequence[int]) -> bool:
        """Whether the channels of a kernel should lie together in memory.

        Args:
            x: The images.
            shape: ``(out_channels, in_channels / groups, *kernel_size)``.
        """
        if x.dim() != 4 or math.prod(shape[2:]) == 1:
            return False
        way = choosing.chosen(self._kind('forward', shape), x)
        return way == 'tiles' or (way != 'groups' and not x.is_contiguous())

    def _kind(self, what: str, shape: Sequence[int], recorded: bool = False) -> tuple:
        return (what, recorded, self, *shape)

    def _fits_tiles(self, x: Tensor) -> bool:
        return x.dim() == 4 and self.groups == 1 and backend.computes_by_tiles(x)

    def _is_joined(self, x: Tensor, shape: torch.Size) -> bool:
        if modes.is_exporting():
            return True
        if shape[1] == 1 and self.groups == shape[0]:
            # Where their channels lie last, images are copied to be joined.
            return x.device.type != 'cpu' or x.is_contiguous()
        # By measurement on an H100, where nothing may be measured. On the CPU it takes up to five
        # times as long.
        return x.device.type != 'cpu' and len(x) > 8


@dataclass(frozen=True)
class SampleLinear:
    """Applies its own linear map to every sample."""

    channel_dim = -1
    # Of a convolution in no dimension of space.
    settings = ((), (), (), 1)

    def __call__(self, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the maps. Autograd can differentiate the result.

        Args:
            x: Tensor[batch, ..., in_features].
            kernels: Tensor[batch, out_features, in_features, 1], as of a convolution of size one.
            bias: Tensor[out_features], shared by the samples.

        Returns:
            Tensor[batch, ..., out_features].
        """
        y = torch.bmm(_tokens(x), kernels.squeeze(-1).transpose(1, 2))
        y = modes.reshaped(y, (*x.shape[:-1], kernels.shape[1]))
        return with_bias(y, bias)

    def backward_kernels(
        self, grad: Tensor, x: Tensor, shape: tuple[int, ...], scratch: Scratch
    ) -> Tensor | Sequence[Tensor]:
        """The gradient of every sample's kernel; see :class:`SampleConv`."""
        gradients = scratch.take(grad, (len(x), *shape[:2]), 'kernel gradients')
        return torch.bmm(_tokens(grad).transpose(1, 2), _tokens(x), out=gradients).unsqueeze(-1)

    def backward_x(self, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the samples; see :class:`SampleConv`."""
        return torch.bmm(_tokens(grad), kernels.squeeze(-1)).view(x.shape)

    def wants_channels_last(self, x: Tensor, shape: Sequence[int]) -> bool:
        """See :class:`SampleConv`."""
        return False


def _tokens(x: Tensor) -> Tensor:
    """Tensor[batch, tokens, features]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
