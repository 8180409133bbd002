"""Convolution and linear map with one kernel per image of the batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes
from .memory import Scratch

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class SampleConv:
    """Convolves every image with its own kernel.

    On the CPU the images are convolved one after the other. A grouped convolution of the whole
    batch would take up to five times as long. On other devices, and for depthwise convolutions, one
    convolution has the groups of all images. For kernels of size one without padding, a batched
    product of matrices computes the result.

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
        """
        batch = x.shape[0]
        if self._is_matrix(kernels):
            sampled = self._sampled(x)
            y = torch.bmm(self._matrices(kernels), self._columns(sampled))
            y = modes.reshaped(y, (batch, kernels.shape[1], *sampled.shape[2:]))
            return y if bias is None else y.add_(bias.view(-1, *[1] * (x.dim() - 2)))
        if batch <= 1 and not modes.is_exporting():
            # One image is an ordinary convolution. Without images, a sum gives a kernel of zeros.
            return self._conv(x, kernels[0] if batch else kernels.sum(0), bias, self.groups)
        if self._is_merged(x, kernels):
            bias = None if bias is None else bias.repeat(batch)
            x = x.reshape(1, -1, *x.shape[2:])
            y = self._conv(x, kernels.flatten(0, 1), bias, batch * self.groups)
            return modes.reshaped(y, (batch, kernels.shape[1], *y.shape[2:]))
        images = (self._conv(x[i : i + 1], kernels[i], bias, self.groups) for i in range(batch))
        return _gathered(images, batch)

    def one(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolves all images with one kernel.

        Args:
            x: Tensor[batch, in_channels, *size].
            kernel: Tensor[out_channels, in_channels / groups, *kernel_size].
        """
        return self._conv(x, kernel, None, self.groups)

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
        batch = x.shape[0]
        # Only the shape of the kernels is used.
        kernels = x.new_empty(batch, *shape)
        if self._is_matrix(kernels):
            sampled = self._columns(self._sampled(x))
            gradients = scratch.take(grad, self._matrices(kernels).shape, 'kernel gradients')
            torch.bmm(self._columns(grad), sampled.transpose(1, 2), out=gradients)
            return gradients.view(kernels.shape)
        if self._is_merged(x, kernels):
            return self._merged_backward(grad, x, kernels, 1).view(kernels.shape)
        return [
            self._conv_backward(grad[i : i + 1], x[i : i + 1], kernels[i], self.groups, 1)
            for i in range(batch)
        ]

    def backward_x(self, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the images, as a constant.

        Args:
            grad: Gradient of the result of the forward call.
            x: The images of the forward call.
            kernels: The kernels of the forward call.
        """
        batch = x.shape[0]
        if self._is_matrix(kernels):
            grad_x = torch.bmm(self._matrices(kernels).transpose(1, 2), self._columns(grad))
            return self._spread(grad_x.view(batch, -1, *grad.shape[2:]), x)
        if self._is_merged(x, kernels):
            return self._merged_backward(grad, x, kernels, 0).view(x.shape)
        images = (
            self._conv_backward(grad[i : i + 1], x[i : i + 1], kernels[i], self.groups, 0)
            for i in range(batch)
        )
        return _gathered(images, batch)

    def _is_matrix(self, kernels: Tensor) -> bool:
        return kernels.shape[3:].numel() == 1 and not any(self.padding)

    def _is_merged(self, x: Tensor, kernels: Tensor) -> bool:
        depthwise = kernels.shape[2] == 1 and self.groups == kernels.shape[1]
        return depthwise or x.device.type != 'cpu' or modes.is_exporting()

    def _matrices(self, kernels: Tensor) -> Tensor:
        """Tensor[batch * groups, out_channels / groups, in_channels / groups]."""
        batch, out_channels, in_channels = kernels.shape[:3]
        return kernels.reshape(batch * self.groups, out_channels // self.groups, in_channels)

    def _columns(self, x: Tensor) -> Tensor:
        """Tensor[batch * groups, in_channels / groups, pixels]."""
        return x.reshape(
            x.shape[0] * self.groups, x.shape[1] // self.groups, math.prod(x.shape[2:])
        )

    def _sampled(self, x: Tensor) -> Tensor:
        """The pixels that a kernel of size one uses, by the stride."""
        if max(self.stride) == 1:
            return x
        index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        return x[index]

    def _spread(self, sampled: Tensor, x: Tensor) -> Tensor:
        """Puts values back to the sampled pixels, and zeros to all other pixels."""
        if max(self.stride) == 1:
            return sampled
        whole = torch.zeros_like(x, memory_format=torch.contiguous_format)
        self._sampled(whole).copy_(sampled)
        return whole

    def _conv(self, x: Tensor, kernels: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        conv = _CONV[x.dim() - 2]
        return conv(x, kernels, bias, self.stride, self.padding, self.dilation, groups)

    def _merged_backward(self, grad: Tensor, x: Tensor, kernels: Tensor, which: int) -> Tensor:
        grad, merged = (t.reshape(1, -1, *t.shape[2:]) for t in (grad, x))
        groups = x.shape[0] * self.groups
        return self._conv_backward(grad, merged, kernels.flatten(0, 1), groups, which)

    def _conv_backward(
        self, grad: Tensor, x: Tensor, kernels: Tensor, groups: int, which: int
    ) -> Tensor:
        """Gradient of the images (0) or of the kernels (1)."""
        no_output_padding = [0] * (x.dim() - 2)
        settings = (self.stride, self.padding, self.dilation, False, no_output_padding, groups)
        mask = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(grad, x, kernels, None, *settings, mask)[which]


@dataclass(frozen=True)
class SampleLinear:
    """Applies its own linear map to every sample."""

    channel_dim = -1

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
        return y if bias is None else y.add_(bias)

    def backward_kernels(
        self, grad: Tensor, x: Tensor, shape: tuple[int, ...], scratch: Scratch
    ) -> Tensor | Sequence[Tensor]:
        """The gradient of every sample's kernel; see :class:`SampleConv`."""
        gradients = scratch.take(grad, (len(x), *shape[:2]), 'kernel gradients')
        return torch.bmm(_tokens(grad).transpose(1, 2), _tokens(x), out=gradients).unsqueeze(-1)

    def backward_x(self, grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
        """The gradient of the samples; see :class:`SampleConv`."""
        return torch.bmm(_tokens(grad), kernels.squeeze(-1)).view(x.shape)


def _tokens(x: Tensor) -> Tensor:
    """Tensor[batch, tokens, features]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _gathered(images: Iterator[Tensor], batch: int) -> Tensor:
    """Joins the results of single images. Each is copied while it is in the caches."""
    if torch.is_grad_enabled() or modes.is_compiling():
        return torch.cat(list(images))
    first = next(images)
    result = first.new_empty(batch, *first.shape[1:])
    for index, image in enumerate(chain([first], images)):
        result[index] = image[0]
    return result
