"""Two-dimensional convolution of a batch on a GPU, each image with its own kernel.

Implicit products of matrices: pixels by channels, the channels of a pixel lying together
(channels last). All images are computed by one launch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers whose values must not lead to another compilation.
_VARYING = [
    *('height', 'width', 'out_height', 'out_width', 'stride_h', 'stride_w'),
    *('pad_h', 'pad_w', 'dilation_h', 'dilation_w'),
]


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision='tf32')


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(
    x,
    kernels,
    y,
    image_stride,
    out_stride,
    place_stride,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y[image, pixel, out] = sum over places and channels of x kernels."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    x += image * height * width * channels
    kernels += image * image_stride
    y += image * out_height * out_width * out_channels
    is_pixel = pixel < out_height * out_width
    row, column = pixel // out_width * stride_h - pad_h, pixel % out_width * stride_w - pad_w
    total = tl.zeros((PIXELS, OUTS), tl.float32)
    for place in range(KERNEL_H * KERNEL_W):
        h = row + place // KERNEL_W * dilation_h
        w = column + place % KERNEL_W * dilation_w
        there = is_pixel & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        of_x = x + (h * width + w) * channels
        of_kernel = kernels + out * out_stride + place * place_stride
        for begin in range(0, channels, DEPTH):
            channel = begin + tl.arange(0, DEPTH)
            a = tl.load(
                of_x[:, None] + channel[None, :],
                mask=there[:, None] & (channel < channels)[None, :],
                other=0.0,
            )
            b = tl.load(
                of_kernel[None, :] + channel[:, None],
                mask=(out < out_channels)[None, :] & (channel < channels)[:, None],
                other=0.0,
            )
            total = _dot(a, b, total)
    tl.store(
        y + pixel[:, None] * out_channels + out[None, :],
        total,
        mask=is_pixel[:, None] & (out < out_channels)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def _backward_x_kernel(
    grad,
    kernels,
    grad_x,
    image_stride,
    out_stride,
    place_stride,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """grad_x[image, pixel, channel] = sum over places and outs of grad kernels."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    grad += image * out_height * out_width * out_channels
    kernels += image * image_stride
    grad_x += image * height * width * channels
    is_pixel = pixel < height * width
    row, column = pixel // width + pad_h, pixel % width + pad_w
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for place in range(KERNEL_H * KERNEL_W):
        h = row - place // KERNEL_W * dilation_h
        w = column - place % KERNEL_W * dilation_w
        there = is_pixel & (h >= 0) & (w >= 0) & (h % stride_h == 0) & (w % stride_w == 0)
        h, w = h // stride_h, w // stride_w
        there = there & (h < out_height) & (w < out_width)
        of_grad = grad + (h * out_width + w) * out_channels
        for begin in range(0, out_channels, DEPTH):
            out = begin + tl.arange(0, DEPTH)
            a = tl.load(
                of_grad[:, None] + out[None, :],
                mask=there[:, None] & (out < out_channels)[None, :],
                other=0.0,
            )
            of_kernel = kernels + out * out_stride + place * place_stride
            b = tl.load(
                of_kernel[:, None] + channel[None, :],
                mask=(out < out_channels)[:, None] & (channel < channels)[None, :],
                other=0.0,
            )
            total = _dot(a, b, total)
    tl.store(
        grad_x + pixel[:, None] * channels + channel[None, :],
        total,
        mask=is_pixel[:, None] & (channel < channels)[None, :],
    )


@triton.jit(do_not_specialize=[*_VARYING, 'channel_blocks'])
def _backward_kernels_kernel(
    grad,
    x,
    grad_kernels,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    channel_blocks,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    OUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """grad_kernels[image, out, place, channel] = sum over pixels of grad x."""
    image = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1)
    out = tl.program_id(0) // channel_blocks * OUTS + tl.arange(0, OUTS)
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    grad += image * out_height * out_width * out_channels
    x += image * height * width * channels
    grad_kernels += image * out_channels * KERNEL_H * KERNEL_W * channels
    total = tl.zeros((OUTS, CHANNELS), tl.float32)
    pixels = out_height * out_width
    for begin in range(0, pixels, DEPTH):
        pixel = begin + tl.arange(0, DEPTH)
        h = pixel // out_width * stride_h - pad_h + place // KERNEL_W * dilation_h
        w = pixel % out_width * stride_w - pad_w + place % KERNEL_W * dilation_w
        there = (pixel < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        a = tl.load(
            grad + pixel[None, :] * out_channels + out[:, None],
            mask=there[None, :] & (out < out_channels)[:, None],
            other=0.0,
        )
        b = tl.load(
            x + ((h * width + w) * channels)[:, None] + channel[None, :],
            mask=there[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        total = _dot(a, b, total)
    tl.store(
        grad_kernels + ((out * KERNEL_H * KERNEL_W + place) * channels)[:, None] + channel[None, :],
        total,
        mask=(out < out_channels)[:, None] & (channel < channels)[None, :],
    )


def forward(
    x: Tensor,
    kernels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolves.

    Args:
        x: Tensor[batch, channels, height, width].
        kernels: Tensor[batch, out_channels, channels, *kernel_size].
        stride: Two values.
        padding: Two values.
        dilation: Two values.

    Returns:
        Tensor[batch, out_channels, out_height, out_width], with the channels last in memory.
    """
    batch, channels, height, width = x.shape
    out_channels, _, *kernel_size = kernels.shape[1:]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((height, width), kernel_size, stride, padding, dilation)
    ]
    y = x.new_empty(batch, *size, out_channels)
    kernels = _of_places(kernels)
    outs = _tile(out_channels)
    pixels = _pixels(size[0] * size[1])
    grid = (triton.cdiv(size[0] * size[1], pixels), triton.cdiv(out_channels, outs), batch)
    _forward_kernel[grid](
        _last(x),
        kernels,
        y,
        *_strides(kernels),
        *(height, width, channels),
        *(*size, out_channels),
        *(*stride, *padding, *dilation),
        *kernel_size,
        pixels,
        outs,
        _depth(channels),
        num_warps=8 if outs == 128 else 4,
        num_stages=3,
    )
    return y.movedim(-1, 1)


def backward_x(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of ``x``, with the channels last in memory; see :func:`forward`."""
    batch, channels, height, width = x.shape
    out_channels, _, *kernel_size = kernels.shape[1:]
    grad_x = x.new_empty(batch, height, width, channels)
    kernels = _of_places(kernels)
    tile, pixels = _tile(channels), _pixels(height * width)
    grid = (triton.cdiv(height * width, pixels), triton.cdiv(channels, tile), batch)
    _backward_x_kernel[grid](
        _last(grad),
        kernels,
        grad_x,
        *_strides(kernels),
        *(height, width, channels),
        *(*grad.shape[2:], out_channels),
        *(*stride, *padding, *dilation),
        *kernel_size,
        pixels,
        tile,
        _depth(out_channels),
        num_warps=8 if tile == 128 else 4,
        num_stages=3,
    )
    return grad_x.movedim(-1, 1)


def backward_kernels(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of the kernels, with the channels last in memory; see :func:`forward`."""
    batch, channels, height, width = x.shape
    out_channels = grad.shape[1]
    grad_kernels = x.new_empty(batch, out_channels, *kernel_size, channels)
    outs, tile = _tile(out_channels), _tile(channels)
    blocks = triton.cdiv(channels, tile)
    grid = (triton.cdiv(out_channels, outs) * blocks, kernel_size[0] * kernel_size[1], batch)
    _backward_kernels_kernel[grid](
        _last(grad),
        _last(x),
        grad_kernels,
        *(height, width, channels),
        *(*grad.shape[2:], out_channels),
        *(*stride, *padding, *dilation),
        blocks,
        *kernel_size,
        outs,
        tile,
        64 if x.dtype != torch.float32 else 32,
        num_warps=8 if outs == tile == 128 else 4,
        num_stages=3,
    )
    return grad_kernels.movedim(-1, 2)


def _last(tensor: Tensor) -> Tensor:
    """The channels last in memory: Tensor[batch, *size, channels] or of kernels, the channels."""
    return tensor.movedim(tensor.dim() - 3, -1).contiguous()


def _of_places(kernels: Tensor) -> Tensor:
    """The channels of a kernel together in memory, and the places evenly spaced."""
    if kernels.stride(2) == 1 and kernels.stride(3) == kernels.shape[4] * kernels.stride(4):
        return kernels
    return _last(kernels).movedim(-1, 2)


def _strides(kernels: Tensor) -> tuple[int, int, int]:
    """From one image, output channel, or place to the next."""
    return kernels.stride(0), kernels.stride(1), kernels.stride(4)


def _tile(channels: int) -> int:
    return min(max(triton.next_power_of_2(channels), 16), 128)


def _pixels(size: int) -> int:
    return 64 if size <= 64 else 128


def _depth(channels: int) -> int:
    return min(max(triton.next_power_of_2(channels), 16), 64)
