"""A whole layer by one call, on the CPU: averages, attends, mixes and applies.

In small layers the choices between these steps take longer than what they choose from, and what
autograd does between them takes as long again. The result is that of the steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, compiled_attention, modes
from .attending import Learning, Parameters, Saved, Unread, attend_plainly
from .averaging import average
from .compiled import STORED, CompiledMixing
from .dynamic import (
    Chosen,
    Needs,
    Settings,
    apply_in_parts,
    apply_plainly,
    backward_in_parts,
    over_space,
)
from .kernels import is_regular
from .sample_conv import SampleConv, SampleLinear


class Operands(NamedTuple):
    """What ``torch.ops.mmkw.attend`` takes beside the images' averages."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]


def apply_to_image(
    x: Tensor,
    seen: Tensor,
    operands: Operands,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: SampleConv | SampleLinear,
    bias: Tensor | None,
) -> Tensor | None:
    """Computes a layer for one image, where nothing learns.

    Args:
        x: Tensor[1, ...], the image or its tokens.
        seen: What the attention averages over space: ``x`` before it is padded.
        operands: Of the attention.
        cells: As in :func:`~mmkw.ops.apply_mixed`.
        grid: As there.
        sample_map: As there.
        bias: As there.

    Returns:
        None where the compiled kernels cannot, or should not, do all of this.
    """
    if not backend.computes_constants(x, seen, cells, bias, *operands.tensors):
        return None
    dtype = modes.autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != cells.dtype:
        # PyTorch says what is wrong.
        return None
    if x.dtype not in STORED or not is_regular(cells, grid):
        return None
    return torch.ops.mmkw.apply_to_image(
        x, seen, *operands.tensors, *operands.numbers, cells, grid, bias, *sample_map.settings
    )


def learn(
    x: Tensor,
    seen: Tensor,
    learning: Learning,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: SampleConv | SampleLinear,
    bias: Tensor | None,
) -> Tensor | None:
    """Computes a layer for any number of images, so that autograd can differentiate it.

    Args:
        x: As in :func:`~mmkw.ops.apply_mixed`.
        seen: What the attention averages over space: ``x`` before it is padded.
        learning: The attention.
        cells: As in :func:`~mmkw.ops.apply_mixed`.
        grid: As there.
        sample_map: As there.
        bias: As there.

    Returns:
        None where nothing learns, and where the compiled kernels cannot do all of this.
    """
    parameters = learning.parameters
    learns = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, cells, bias, *parameters)
    )
    dtype = modes.autocast_dtype(x)
    if not learns or (dtype or x.dtype) not in STORED or seen.dtype not in STORED:
        return None
    if dtype is None and x.dtype != cells.dtype:
        # PyTorch says what is wrong.
        return None
    settings = Settings(grid, sample_map, dtype or cells.dtype)
    # Attentions are of the precision of the weights that they come from.
    mixing_of = backend.mixing_of(x, parameters.fc2_weight, cells, *settings, True)
    if mixing_of is None or mixing_of.func is not CompiledMixing or not modes.is_plain(seen):
        return None
    chosen = Chosen.of(settings, mixing_of, cells)

    def applied(x: Tensor, bias: Tensor | None) -> Tensor:
        apart = None if seen is x else seen
        return _Learn.apply(
            x, apart, cells, bias, chosen.token_tensor, *parameters, chosen, learning[1:]
        )

    if dtype is None:
        return applied(x, bias)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast('cpu', enabled=False):
        return applied(x.to(dtype), bias)


class _Learn(torch.autograd.Function):
    """The layer as autograd sees it. What is averaged is given if it is not the images."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        cells: Tensor,
        bias: Tensor | None,
        token_tensor: Tensor | None,
        *arguments: Any,
    ) -> Tensor:
        *given, chosen, (norm, start, eps) = arguments
        parameters, is_tokens = Parameters(*given), chosen.settings.sample_map.channel_dim == -1
        pooled = torch.ops.mmkw.average(x if seen is None else seen, is_tokens)
        attention, saved = compiled_attention.forward(pooled, parameters, norm, start, eps)
        kept: list[Tensor | None] = []
        mixing = chosen.mixing_of(cells)
        result = apply_in_parts(x, attention, bias, None, chosen.settings, mixing, kept)
        needs = ctx.needs_input_grad
        ctx.needs_average = needs[0 if seen is None else 1]
        read, ctx.unread = Unread.apart(parameters, norm, (ctx.needs_average, *needs[5:]))
        ctx.save_for_backward(x, seen, cells, bias, pooled, attention, *read, *saved, *kept)
        ctx.chosen, ctx.rest = chosen, (norm, start, eps)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seen, cells, bias, pooled, attention, *tensors = ctx.saved_tensors
        last, end = len(Parameters._fields), len(Parameters._fields) + len(Saved._fields)
        parameters, saved = ctx.unread.joined(tensors[:last]), Saved(*tensors[last:end])
        if torch.is_grad_enabled() or modes.is_seen_through(grad, x, cells):
            ctx.unread.check()
            with modes.without_autocast(x):
                gradients = _backward_plainly(ctx, grad, (x, seen, cells, bias), parameters)
            return *gradients[:4], None, *gradients[4:], None, None
        needs, source = ctx.needs_input_grad, x if seen is None else seen
        of_parameters: Sequence[Tensor | None] = [None] * last
        of_seen = None
        norm, start, eps = ctx.rest

        def through(grad_attention: Tensor) -> Tensor | None:
            nonlocal of_parameters, of_seen
            of_average, *of_parameters = compiled_attention.backward(
                grad_attention, pooled, parameters, norm.kind, start.temperature, eps, saved
            )
            if not ctx.needs_average:
                return None
            # Cast before it is expanded.
            of_pixel = (of_average / (source.numel() // pooled.numel())).to(source.dtype)
            if seen is None:
                return of_pixel
            is_tokens = ctx.chosen.settings.sample_map.channel_dim == -1
            of_seen = over_space(of_pixel, seen.dim(), is_tokens).expand(seen.shape)
            return None

        attends = ctx.needs_average or any(needs[5:])
        need = Needs(needs[0], attends, needs[3])
        operands = grad, x, attention, cells, None, tensors[end:]
        with modes.without_autocast(x):
            of_x, _, of_bias, _ = backward_in_parts(ctx.chosen, need, *operands, through)
        needed = (value if need else None for value, need in zip(of_parameters, needs[5:]))
        # The gradient of the cells goes through the token that the layers share.
        return of_x, of_seen, None, of_bias, None, *needed, None, None


def _backward_plainly(
    ctx: Any, grad: Tensor, operands: Sequence[Tensor | None], parameters: Parameters
) -> list[Tensor | None]:
    """Computes the gradients by autograd, so that they can be differentiated and transformed."""
    needs = ctx.needs_input_grad
    norm, start, eps = ctx.rest
    settings = ctx.chosen.settings
    with torch.enable_grad():
        # New views, so that differentiation ends here.
        views: list[Any] = [
            None if tensor is None else tensor.view_as(tensor)
            for tensor in (*operands, *parameters)
        ]
        x, seen, cells, bias, *given = views
        pooled = average(x if seen is None else seen, settings.sample_map.channel_dim)
        attention = attend_plainly(pooled, Parameters(*given), norm, start, eps)
        result = apply_plainly(x, attention, cells, bias, None, settings)
    needed = [view if need else None for view, need in zip(views, (*needs[:4], *needs[5:]))]
    inputs = [view for view in needed if view is not None]
    again = torch.is_grad_enabled()
    gradients = iter(torch.autograd.grad(result, inputs, grad, create_graph=again))
    return [None if view is None else next(gradients) for view in needed]
