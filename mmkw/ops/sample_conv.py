"""Convolution and linear map with a kernel of its own for every image of the batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def sample_conv(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Convolves every image with its own kernel.

    Args:
        x: Tensor[batch, in_channels, *size] with one, two or three spatial dimensions. The batch
            may be empty.
        kernels: Tensor[batch, out_channels, in_channels / groups, *kernel_size].
        bias: Tensor[out_channels], shared by the images.
        stride: One value per spatial dimension, or one for all.
        padding: The same, or ``'same'`` or ``'valid'``.
        dilation: The same as ``stride``.
        groups: Groups of one image's convolution.

    Returns:
        Tensor[batch, out_channels, *output_size].
    """
    batch, channels, *size = x.shape
    out_channels = kernels.shape[1]
    conv = _CONV[len(size)]
    if batch <= 1:
        # One image is an ordinary convolution; of no image, the sum is a kernel of the right shape.
        kernel = kernels[0] if batch else kernels.sum(0)
        return conv(x, kernel, bias, stride, padding, dilation, groups)

    if groups == 1 and _is_pointwise(kernels, padding):
        steps = stride if len(stride) == len(size) else tuple(stride) * len(size)
        if any(step > 1 for step in steps):
            x = x[(..., *(slice(None, None, step) for step in steps))]
        size = x.shape[2:]
        y = torch.bmm(kernels.flatten(2).flatten(2), x.flatten(2)).view(batch, out_channels, *size)
    else:
        y = conv(
            x.reshape(1, batch * channels, *size),
            kernels.flatten(0, 1),
            None,
            stride,
            padding,
            dilation,
            batch * groups,
        )
        y = y.view(batch, out_channels, *y.shape[2:])
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * len(size))


def sample_linear(x: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Applies to every sample its own linear map.

    Args:
        x: Tensor[batch, ..., in_features].
        kernels: Tensor[batch, out_features, in_features].
        bias: Tensor[out_features], shared by the samples.

    Returns:
        Tensor[batch, ..., out_features].
    """
    tokens = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
    y = torch.bmm(tokens, kernels.transpose(1, 2)).view(*x.shape[:-1], kernels.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def _is_pointwise(kernels: Tensor, padding: Sequence[int] | str) -> bool:
    unpadded = isinstance(padding, str) or not any(padding)
    return unpadded and kernels.shape[3:].numel() == 1
