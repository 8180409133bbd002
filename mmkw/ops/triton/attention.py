"""The attention function (paper, section 3.4) and its gradient, in few kernels.

As operators of PyTorch it would be twenty small kernels, and forty more for the gradient. Starting
these takes longer than computing them. Here the norm is one kernel, and so are the attentions from
the logits; each has one for the gradient. PyTorch multiplies the matrices, except where a gradient
is small.

The whole batch is one tile, so that a BatchNorm finds its statistics in one program.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..attending import Learning, Parameters, Saved

# Larger ones would not fit into the registers: the images of a batch, and the cells of a warehouse.
MOST_IMAGES = 128
MOST_CELLS = 8191
# Triton multiplies matrices of at least this size.
_LEAST = 16
# Values of a tile of weights.
_TILE = 8192
# Numbers whose values must not lead to another compilation.
_VARYING = ['mixtures', 'outputs', 'temperature']


@triton.jit
def _normalised(hidden, rows, columns, count, width, eps, KIND: tl.constexpr):
    """Subtracts the mean and divides by the deviation, over the batch or over the units."""
    inside = rows & columns
    axis: tl.constexpr = 0 if KIND == 'batch' else 1
    number = count if KIND == 'batch' else width
    mean = tl.sum(tl.where(inside, hidden, 0.0), axis, keep_dims=True) / number
    centred = tl.where(inside, hidden - mean, 0.0)
    var = tl.sum(centred * centred, axis, keep_dims=True) / number
    inverse = 1.0 / tl.sqrt(var + eps)
    return centred * inverse, mean, var, inverse


@triton.jit(do_not_specialize=['images', 'eps', 'momentum'])
def _norm_kernel(
    before,
    running_mean,
    running_var,
    num_batches,
    norm_weight,
    norm_bias,
    hidden,
    normed,
    inverses,
    images,
    width,
    eps,
    momentum,
    KIND: tl.constexpr,
    COUNTS: tl.constexpr,
    IMAGES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Computes relu(norm(before)), for UNITS of the hidden units."""
    image = tl.arange(0, IMAGES)[:, None]
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    rows, columns = image < images, unit < width
    inside = rows & columns
    place = image * width + unit
    total = tl.load(before + place, mask=inside, other=0.0)
    if KIND == 'running':
        mean = tl.load(running_mean + unit, mask=columns, other=0.0)
        inverse = 1.0 / tl.sqrt(tl.load(running_var + unit, mask=columns, other=1.0) + eps)
        centred = (total - mean) * inverse
    else:
        centred, mean, var, inverse = _normalised(total, rows, columns, images, width, eps, KIND)
        if KIND == 'batch':
            old = tl.load(running_mean + unit, mask=columns, other=0.0)
            tl.store(running_mean + unit, (1 - momentum) * old + momentum * mean, mask=columns)
            old = tl.load(running_var + unit, mask=columns, other=0.0)
            unbiased = var * images / (images - 1)
            tl.store(running_var + unit, (1 - momentum) * old + momentum * unbiased, mask=columns)
            if COUNTS and tl.program_id(0) == 0:
                tl.store(num_batches, tl.load(num_batches) + 1)
    if KIND == 'layer':
        tl.store(inverses + image, inverse, mask=rows)
    else:
        tl.store(inverses + unit, inverse, mask=columns)
    gain = tl.load(norm_weight + unit, mask=columns, other=0.0)
    shift = tl.load(norm_bias + unit, mask=columns, other=0.0)
    tl.store(normed + place, centred, mask=inside)
    value = centred * gain + shift
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(hidden + place, value, mask=inside)


@triton.jit
def _row(logits, row, outputs, denominator_eps, OUTPUTS: tl.constexpr):
    """The logits of one image's mixture, and the sum of their magnitudes."""
    cell = tl.arange(0, OUTPUTS)
    z = tl.load(logits + row * outputs + cell, mask=cell < outputs, other=0.0)
    return cell, z, tl.sum(tl.abs(z), 0) + denominator_eps


@triton.jit(do_not_specialize=_VARYING)
def _attention_kernel(
    logits,
    assigned,
    attention,
    mixtures,
    outputs,
    temperature,
    denominator_eps,
    OUTPUTS: tl.constexpr,
):
    """(1 - tau) z / sum |z| + tau beta. The last logit is that of the zero cell."""
    row = tl.program_id(0)
    cell, z, total = _row(logits, row, outputs, denominator_eps, OUTPUTS)
    beta = tl.where(cell == tl.load(assigned + row % mixtures), 1.0, 0.0)
    alpha = z / total
    alpha += temperature * (beta - alpha)
    tl.store(attention + row * (outputs - 1) + cell, alpha, mask=cell < outputs - 1)


@triton.jit(do_not_specialize=_VARYING)
def _attention_backward_kernel(
    grad,
    logits,
    grad_logits,
    outputs,
    temperature,
    denominator_eps,
    OUTPUTS: tl.constexpr,
):
    """The gradient of the logits of one image's mixture."""
    row = tl.program_id(0)
    cell, z, total = _row(logits, row, outputs, denominator_eps, OUTPUTS)
    g = tl.load(grad + row * (outputs - 1) + cell, mask=cell < outputs - 1, other=0.0)
    along = tl.sum(g * z, 0) / total
    sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
    tl.store(
        grad_logits + row * outputs + cell,
        (1.0 - temperature) * (g - sign * along) / total,
        mask=cell < outputs,
    )


@triton.jit(do_not_specialize=['images'])
def _hidden_backward_kernel(
    grad_hidden,
    hidden,
    normed,
    inverses,
    norm_weight,
    pooled,
    grad_before,
    grad_fc1,
    grad_fc1_bias,
    grad_norm_weight,
    grad_norm_bias,
    images,
    channels,
    width,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IMAGES: tl.constexpr,
    UNITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of the norm and of fc1, for UNITS of the hidden units."""
    image = tl.arange(0, IMAGES)[:, None]
    unit = (tl.program_id(0) * UNITS + tl.arange(0, UNITS))[None, :]
    rows, columns = image < images, unit < width
    inside = rows & columns
    place = image * width + unit
    grad = tl.load(grad_hidden + place, mask=inside, other=0.0)
    grad = tl.where(tl.load(hidden + place, mask=inside, other=0.0) > 0, grad, 0.0)
    centred = tl.load(normed + place, mask=inside, other=0.0)
    tl.store(grad_norm_weight + unit, tl.sum(grad * centred, 0, keep_dims=True), mask=columns)
    tl.store(grad_norm_bias + unit, tl.sum(grad, 0, keep_dims=True), mask=columns)
    grad *= tl.load(norm_weight + unit, mask=columns, other=0.0)
    if KIND != 'running':
        axis: tl.constexpr = 0 if KIND == 'batch' else 1
        number = images if KIND == 'batch' else width
        mean = tl.sum(grad, axis, keep_dims=True) / number
        along = tl.sum(grad * centred, axis, keep_dims=True) / number
        grad = tl.where(inside, grad - mean - centred * along, 0.0)
    if KIND == 'layer':
        grad *= tl.load(inverses + image, mask=rows, other=0.0)
    else:
        grad *= tl.load(inverses + unit, mask=columns, other=0.0)
    tl.store(grad_before + place, grad, mask=inside)
    if HAS_BIAS:
        tl.store(grad_fc1_bias + unit, tl.sum(grad, 0, keep_dims=True), mask=columns)
    for begin in range(0, channels, CHANNELS):
        channel = begin + tl.arange(0, CHANNELS)[None, :]
        x = tl.load(
            pooled + image * channels + channel, mask=rows & (channel < channels), other=0.0
        )
        tl.store(
            grad_fc1 + tl.trans(unit) * channels + channel,
            tl.dot(tl.trans(grad), x, input_precision='ieee'),
            mask=tl.trans(columns) & (channel < channels),
        )


def forward(pooled: Tensor, learning: Learning) -> tuple[Tensor, Saved]:
    """Computes attentions.

    Args:
        pooled: Tensor[batch, channels] in float32, with at most MOST_IMAGES images.
        learning: The attention.

    Returns:
        Tensor[batch, mixtures, cells], and what :func:`backward` needs.
    """
    parameters, norm, start, denominator_eps = learning
    images, width = len(pooled), len(parameters.fc1_weight)
    mixtures = len(start.assigned)
    outputs = len(parameters.fc2_bias) // mixtures
    before = F.linear(pooled, parameters.fc1_weight, parameters.fc1_bias)
    hidden, normed = torch.empty_like(before), torch.empty_like(before)
    inverses = pooled.new_empty(images if norm.kind == 'layer' else width)
    units = _units(norm.kind, width)
    _norm_kernel[(triton.cdiv(width, units),)](
        before,
        norm.mean,
        norm.var,
        norm.batches,
        parameters.norm_weight,
        parameters.norm_bias,
        hidden,
        normed,
        inverses,
        images,
        width,
        norm.eps,
        norm.momentum,
        norm.kind,
        norm.batches is not None,
        _padded(images),
        units,
    )
    logits = F.linear(hidden, parameters.fc2_weight, parameters.fc2_bias)
    attention = pooled.new_empty(images, mixtures, outputs - 1)
    _attention_kernel[(images * mixtures,)](
        logits,
        start.assigned,
        attention,
        mixtures,
        outputs,
        start.temperature,
        denominator_eps,
        triton.next_power_of_2(outputs),
    )
    return attention, Saved(hidden, normed, inverses, logits)


def backward(
    grad: Tensor, pooled: Tensor, learning: Learning, saved: Saved
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of the pooled images and of all parameters, in their order.

    Args:
        grad: Gradient of the attentions, contiguous.
        pooled: As in :func:`forward`.
        learning: As in :func:`forward`.
        saved: Of :func:`forward`.
    """
    parameters, norm, start, denominator_eps = learning
    images, mixtures, cells = grad.shape
    width, channels = parameters.fc1_weight.shape
    grad_logits = torch.empty_like(saved.logits)
    _attention_backward_kernel[(images * mixtures,)](
        grad,
        saved.logits,
        grad_logits,
        cells + 1,
        start.temperature,
        denominator_eps,
        triton.next_power_of_2(cells + 1),
    )
    gradients = Parameters(
        torch.empty_like(parameters.fc1_weight),
        None if parameters.fc1_bias is None else torch.empty_like(parameters.fc1_bias),
        torch.empty_like(parameters.norm_weight),
        torch.empty_like(parameters.norm_bias),
        grad_logits.t() @ saved.hidden,
        grad_logits.sum(0),
    )
    grad_hidden = grad_logits @ parameters.fc2_weight
    before = pooled.new_empty(images, width)
    units = _units(norm.kind, width)
    _hidden_backward_kernel[(triton.cdiv(width, units),)](
        grad_hidden,
        saved.hidden,
        saved.normed,
        saved.inverses,
        parameters.norm_weight,
        pooled,
        before,
        gradients.fc1_weight,
        gradients.fc1_bias,
        gradients.norm_weight,
        gradients.norm_bias,
        images,
        channels,
        width,
        norm.kind,
        parameters.fc1_bias is not None,
        _padded(images),
        units,
        _block(images, channels),
    )
    return before @ parameters.fc1_weight, *gradients


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), _LEAST)


def _block(other: int, size: int) -> int:
    """The size of a tile whose other size is given: as few steps as the registers allow."""
    return min(_padded(size), max(_TILE // _padded(other), _LEAST), 256)


def _units(kind: str, width: int) -> int:
    """Hidden units of a program. A LayerNorm needs them all."""
    return _padded(width) if kind == 'layer' else _LEAST
