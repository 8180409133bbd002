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

# Of a channel of an image. Depthwise convolutions of fewer are joined wherever their channels lie.
_FEW_PRODUCTS = 1024
# PyTorch gives no single image of so few values to its library for convolutions (float32), unless
# the convolution has groups or a larger kernel.
_SMALL_IMAGE, _SMALL_KERNEL_SIZE = 20480, 3
# Values of a kernel, or of the gradients of all kernels, below which joining then pays.
_FEW_WEIGHTS = 1 << 18
_WAYS: dict[str, type[Way]] = dict(images=Images, groups=Groups, tiles=Tiles)


@dataclass(frozen=True)
class SampleConv(Geometry):
    """Convolves every image with its own kernel.

    For kernels of size one without padding, a batched product of matrices computes the result, or
    on a CPU that convolves faster one convolution after the other, which is measured once. Others
    are convolved one image after the other, by one convolution with the groups of all
    images, or on a GPU by a kernel of our own. There the fastest is found by measurement, for every
    kind of shape; see :mod:`.choosing`. On the CPU depthwise convolutions are joined, if images are
    small or their channels lie first, and others with small kernels where PyTorch would take a
    slower way for one small image than for several. Joining more would take up to five times as
    long.

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
            way: type[Way] = Images if self._is_convolved(what, x, kernels) else Products
            return getattr(way, what)(self, *operands)
        return getattr(self._way(what, x, kernels, operands), what)(self, *operands)

    def _way(self, what: str, x: Tensor, kernels: Tensor, operands: Sequence[Any]) -> type[Way]:
        """The way for kernels larger than one."""
        way = 'groups' if self._is_joined(what, x, kernels.shape[1:]) else 'images'
        if choosing.may_choose(x) and not modes.is_seen_through(x, kernels):
            recorded = torch.is_grad_enabled() and any(
                isinstance(operand, Tensor) and operand.requires_grad for operand in operands
            )
            kind = self._kind(what, kernels.shape[1:], recorded)
            way = choosing.chosen(kind, x) or choosing.choose(
                kind, x, way, self._ways(what, x, operands, recorded)
            )
        return _WAYS[way]

    def _is_convolved(self, what: str, x: Tensor, kernels: Tensor) -> bool:
        """Whether PyTorch convolves by kernels of size one faster than it multiplies them."""
        if self.groups > 1 or not _may_convolve(x, kernels):
            return False
        channels_last = not x.is_contiguous()
        # Of volumes PyTorch's choice of a library is another one, and gradients are slow.
        if x.dim() > 4 or (channels_last and not Products.is_channels_last(self, x)):
            return False
        pixels = math.prod(-(-size // step) for size, step in zip(x.shape[2:], self.stride))
        return torch.ops.mmkw.is_convolution_faster(what, *kernels.shape[:3], pixels, channels_last)

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

    def _is_joined(self, what: str, x: Tensor, shape: torch.Size) -> bool:
        if modes.is_exporting():
            return True
        if shape[1] == 1 and self.groups == shape[0]:
            return not self._is_copied_to_join(x, shape)
        if x.device.type == 'cpu':
            weights = shape.numel() * (len(x) if what == 'kernels' else 1)
            return weights < _FEW_WEIGHTS and self._is_slow_alone(x, shape)
        # By measurement on an H100, where nothing may be measured.
        return len(x) > 8

    def _is_slow_alone(self, x: Tensor, shape: torch.Size) -> bool:
        """Whether PyTorch convolves one of several images by a way that is slower than for all."""
        return (
            len(x) > 1
            and x.dim() == 4
            and self.groups == 1
            and x.dtype == torch.float32
            and x.shape[1:].numel() <= _SMALL_IMAGE
            and min(shape[2:]) <= _SMALL_KERNEL_SIZE
            and bool(torch.backends.mkldnn.enabled)
            and not modes.is_seen_through(x)
            and x.is_contiguous()
        )

    @staticmethod
    def _is_copied_to_join(x: Tensor, shape: Sequence[int]) -> bool:
        """Whether images on the CPU have their channels last, and more to compute than a call."""
        if x.device.type != 'cpu' or x.dim() != 4 or modes.is_seen_through(x):
            return False
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        return math.prod(x.shape[2:]) * math.prod(shape[2:]) > _FEW_PRODUCTS


@dataclass(frozen=True)
class SampleLinear:
    """Applies its own linear map to every sample."""

    channel_dim = -1
    # Of a convolution in no dimension of space.
    settings = ((), (), (), 1)
    # By which tokens may be convolved as pixels.
    _pixelwise = Geometry((1, 1), (0, 0), (1, 1))

    def __call__(self, x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Applies the maps. Autograd can differentiate the result.

        Args:
            x: Tensor[batch, ..., in_features].
            kernels: Tensor[batch, out_features, in_features, 1], as of a convolution of size one.
            bias: Tensor[out_features], shared by the samples.

        Returns:
            Tensor[batch, ..., out_features].
        """
        if self._is_convolved('forward', x, kernels, kernels.shape[1:3]):
            y = Images.forward(self._pixelwise, _pixels(x), kernels.unsqueeze(-1), bias)
            return modes.reshaped(y.movedim(1, -1), (*x.shape[:-1], kernels.shape[1]))
        y = torch.bmm(_tokens(x), kernels.squeeze(-1).transpose(1, 2))
        y = modes.reshaped(y, (*x.shape[:-1], kernels.shape[1]))
        return with_bias(y, bias)

    def backward_kernels(
        self, grad: Tensor, x: Tensor, shape: tuple[int, ...], scratch: Scratch
    ) -> Tensor | Sequence[Tensor]:
        """The gradient of every sample's kernel; see :class:`SampleConv`."""
        if self._is_convolved('kernels', x, grad, shape[:2]):
            # Only the shape of the kernels is used.
            kernels = x.new_empty(len(x), *shape, 1)
            found = Images.kernels(self._pixelwise, _pixels(grad), _pixels(x), kernels, scratch)
            return [gradient.squeeze(-1) for gradient in found]
        gradients = scratch.take(grad, (len(x), *shape[:2]), 'kernel gradients')
        return torch.bmm(_tokens(grad).transpose(1, 2), _tokens(x), out=gradients).unsqueeze(-1)

    def backward_x(self, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the samples; see :class:`SampleConv`."""
        if self._is_convolved('x', x, kernels, kernels.shape[1:3]):
            images = _pixels(grad), _pixels(x), kernels.unsqueeze(-1)
            return Images.x(self._pixelwise, *images).movedim(1, -1).view(x.shape)
        return torch.bmm(_tokens(grad), kernels.squeeze(-1)).view(x.shape)

    def _is_convolved(self, what: str, x: Tensor, other: Tensor, shape: Sequence[int]) -> bool:
        """As of a convolution, by the other operand and the shape of a kernel."""
        if not _may_convolve(x, other) or not x.is_contiguous():
            return False
        tokens = math.prod(x.shape[1:-1])
        return torch.ops.mmkw.is_convolution_faster(what, len(x), *shape, tokens, True)

    def wants_channels_last(self, x: Tensor, shape: Sequence[int]) -> bool:
        """See :class:`SampleConv`."""
        return False


def _may_convolve(x: Tensor, other: Tensor) -> bool:
    """Whether kernels of size one may be convolved: constants of float32 that lie on the CPU."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and modes.autocast_dtype(x) is None
        and backend.computes_constants(x, other)
    )


def _pixels(x: Tensor) -> Tensor:
    """Tensor[batch, features, tokens, 1], as an image whose channels lie last."""
    return _tokens(x).unsqueeze(2).movedim(-1, 1)


def _tokens(x: Tensor) -> Tensor:
    """Tensor[batch, tokens, features]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
