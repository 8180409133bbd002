"""The ways in which PyTorch convolves a batch with one kernel per image.

All ways give the same results. Which one is the fastest depends on the device and on the sizes;
:mod:`.choosing` finds out. The compiled kernels have ways of their own, for constants on the CPU
(``csrc/convolution.cpp``). A way has three methods, for the result, for the gradients of the
kernels, and for the gradient of the images; see :class:`~mmkw.ops.sample_conv.SampleConv`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes
from .memory import Scratch

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """The settings of a convolution, the same for all images.

    Args:
        stride: Stride, one value per spatial dimension.
        padding: Padding, one value per spatial dimension.
        dilation: Dilation, one value per spatial dimension.
        groups: Groups of one image's convolution.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def settings(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Convolves by PyTorch."""
        conv = _CONV[x.dim() - 2]
        return conv(x, kernel, bias, self.stride, self.padding, self.dilation, groups)

    def backward(self, grad: Tensor, x: Tensor, kernel: Tensor, groups: int, which: int) -> Tensor:
        """Gradient of the images (``which`` 0) or of the kernel (1)."""
        no_output_padding = [0] * (x.dim() - 2)
        settings = (self.stride, self.padding, self.dilation, False, no_output_padding, groups)
        mask = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(grad, x, kernel, None, *settings, mask)[which]

    def is_pointwise(self, kernels: Tensor) -> bool:
        """Whether kernels have a size of one, and no padding."""
        return kernels.shape[3:].numel() == 1 and not any(self.padding)


class Way(Protocol):
    """Computes a convolution with one kernel per image, and its gradients."""

    @staticmethod
    def forward(conv: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """Convolves; see :meth:`mmkw.ops.SampleConv.__call__`."""

    @staticmethod
    def kernels(
        conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, scratch: Scratch
    ) -> Tensor | Sequence[Tensor]:
        """The gradient of the kernels; see :meth:`mmkw.ops.SampleConv.backward_kernels`."""

    @staticmethod
    def x(conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the images; see :meth:`mmkw.ops.SampleConv.backward_x`."""


class Images(Way):
    """One image after the other."""

    @staticmethod
    def forward(conv: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Way`."""
        operands = zip(x.split(1), kernels.unbind(), strict=True)
        return _gathered((conv.convolve(v, k, bias, conv.groups) for v, k in operands), len(x))

    @staticmethod
    def kernels(
        conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, scratch: Scratch
    ) -> Sequence[Tensor]:
        """See :class:`Way`."""
        images = zip(grad.split(1), x.split(1), kernels.unbind(), strict=True)
        return [conv.backward(*each, conv.groups, 1) for each in images]

    @staticmethod
    def x(conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """See :class:`Way`."""
        operands = zip(grad.split(1), x.split(1), kernels.unbind(), strict=True)
        return _gathered((conv.backward(*each, conv.groups, 0) for each in operands), len(x))


class Groups(Way):
    """One convolution that has the groups of all images."""

    @staticmethod
    def forward(conv: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Way`."""
        batch = x.shape[0]
        bias = None if bias is None else bias.repeat(batch)
        x = x.reshape(1, -1, *x.shape[2:])
        y = conv.convolve(x, kernels.flatten(0, 1), bias, batch * conv.groups)
        return modes.reshaped(y, (batch, kernels.shape[1], *y.shape[2:]))

    @classmethod
    def kernels(
        cls, conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, scratch: Scratch
    ) -> Tensor:
        """See :class:`Way`."""
        return cls._backward(conv, grad, x, kernels, 1).view(kernels.shape)

    @classmethod
    def x(cls, conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """See :class:`Way`."""
        return cls._backward(conv, grad, x, kernels, 0).view(x.shape)

    @staticmethod
    def _backward(conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, which: int) -> Tensor:
        grad, merged = (t.reshape(1, -1, *t.shape[2:]) for t in (grad, x))
        groups = len(x) * conv.groups
        return conv.backward(grad, merged, kernels.flatten(0, 1), groups, which).contiguous()


class Products(Way):
    """A batched product of matrices, for kernels of size one without padding."""

    @classmethod
    def forward(cls, conv: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Way`."""
        sampled = cls._sampled(conv, x)
        if cls.is_channels_last(conv, x):
            y = torch.bmm(cls._pixels(sampled), cls._matrices(conv, kernels).transpose(1, 2))
            y = modes.reshaped(y, (len(x), *sampled.shape[2:], kernels.shape[1])).movedim(-1, 1)
        else:
            y = torch.bmm(cls._matrices(conv, kernels), cls._columns(conv, sampled))
            y = modes.reshaped(y, (len(x), kernels.shape[1], *sampled.shape[2:]))
        return with_bias(y, None if bias is None else bias.view(-1, *[1] * (x.dim() - 2)))

    @classmethod
    def kernels(
        cls, conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, scratch: Scratch
    ) -> Tensor:
        """See :class:`Way`."""
        sampled = cls._sampled(conv, x)
        gradients = scratch.take(grad, cls._matrices(conv, kernels).shape, 'kernel gradients')
        if cls.is_channels_last(conv, x):
            torch.bmm(cls._pixels(grad).transpose(1, 2), cls._pixels(sampled), out=gradients)
        else:
            columns = cls._columns(conv, sampled)
            torch.bmm(cls._columns(conv, grad), columns.transpose(1, 2), out=gradients)
        return gradients.view(kernels.shape)

    @classmethod
    def x(cls, conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """See :class:`Way`."""
        matrices = cls._matrices(conv, kernels)
        if cls.is_channels_last(conv, x):
            sampled = torch.bmm(cls._pixels(grad), matrices)
            sampled = sampled.view(len(x), *grad.shape[2:], x.shape[1]).movedim(-1, 1)
        else:
            sampled = torch.bmm(matrices.transpose(1, 2), cls._columns(conv, grad))
            sampled = sampled.view(len(x), -1, *grad.shape[2:])
        if max(conv.stride) == 1:
            return sampled
        # Zeros to all pixels that the kernel has not used.
        whole = torch.zeros_like(x)
        cls._sampled(conv, whole).copy_(sampled)
        return whole

    @staticmethod
    def is_channels_last(conv: Geometry, x: Tensor) -> bool:
        """Whether the channels of a pixel lie together. They are taken as they lie."""
        if modes.is_exporting() or conv.groups > 1:
            return False
        # Results of PyTorch's convolutions do not lie so in one dimension, nor of one volume.
        if x.dim() == 3 or (x.dim() == 5 and len(x) == 1):
            return False
        return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()

    @staticmethod
    def _matrices(conv: Geometry, kernels: Tensor) -> Tensor:
        """Tensor[batch * groups, out_channels / groups, in_channels / groups]."""
        batch, out_channels, in_channels = kernels.shape[:3]
        return kernels.reshape(batch * conv.groups, out_channels // conv.groups, in_channels)

    @staticmethod
    def _columns(conv: Geometry, x: Tensor) -> Tensor:
        """Tensor[batch * groups, in_channels / groups, pixels]."""
        return x.reshape(
            x.shape[0] * conv.groups, x.shape[1] // conv.groups, math.prod(x.shape[2:])
        )

    @staticmethod
    def _pixels(x: Tensor) -> Tensor:
        """Tensor[batch, pixels, channels]."""
        return x.movedim(1, -1).reshape(x.shape[0], math.prod(x.shape[2:]), x.shape[1])

    @staticmethod
    def _sampled(conv: Geometry, x: Tensor) -> Tensor:
        """The pixels that a kernel of size one uses, by the stride."""
        if max(conv.stride) == 1:
            return x
        index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in conv.stride))
        return x[index]


class Tiles(Way):
    """Kernels for GPUs that convolve all images at once; see ``mmkw.ops.triton.convolution``."""

    @staticmethod
    def forward(conv: Geometry, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`Way`."""
        y = _tiles().forward(x, kernels, conv.stride, conv.padding, conv.dilation)
        if bias is not None:
            y += bias.view(-1, 1, 1)
        return _laid_out_like(x, y)

    @staticmethod
    def kernels(
        conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor, scratch: Scratch
    ) -> Tensor:
        """See :class:`Way`."""
        settings = conv.stride, conv.padding, conv.dilation
        return _tiles().backward_kernels(grad, x, kernels.shape[3:], *settings)

    @staticmethod
    def x(conv: Geometry, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """See :class:`Way`."""
        settings = conv.stride, conv.padding, conv.dilation
        return _laid_out_like(x, _tiles().backward_x(grad, x, kernels, *settings))


def _tiles() -> Any:
    # Imported here, because it needs Triton.
    from .triton import convolution

    return convolution


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """Lays the result in memory as PyTorch would: as the images lie."""
    return y.contiguous() if x.is_contiguous() else y


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias to a result that nothing else uses.

    Args:
        y: The result.
        bias: What is added, of a shape that broadcasts to that of ``y``; None adds nothing.
    """
    if bias is None:
        return y
    # A transformation may map over biases alone, and y has no room for the results.
    return y + bias if modes.is_transforming() else y.add_(bias)


def _gathered(images: Iterator[Tensor], batch: int) -> Tensor:
    """Joins the results of single images. On the CPU each is copied while it is in the caches.

    Channels that lie last do so in the result.
    """
    first = next(images)
    if batch == 1:
        return first
    if torch.is_grad_enabled() or modes.is_compiling() or first.device.type != 'cpu':
        return torch.cat([first, *images])
    if not first.is_contiguous() and first.movedim(1, -1).is_contiguous():
        result = first.new_empty(batch, *first.shape[2:], first.shape[1]).movedim(-1, 1)
    else:
        result = first.new_empty(batch, *first.shape[1:])
    for place, image in zip(result.split(1), chain([first], images), strict=True):
        place.copy_(image)
    return result
