"""A whole layer by one call, on the CPU: averages, attends, mixes and applies.

In small layers the choices between these steps take longer than what they choose from, and what
autograd does between them takes as long again. The result is that of the steps.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, compiled_attention, modes, recorded
from .attending import Learning, Parameters, Saved, Unread, attend_plainly, count_batch
from .averaging import average
from .compiled import STORED, CompiledMixing
from .dynamic import Chosen, Needs, Settings, apply_in_parts, apply_plainly, backward_in_parts
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

    The caller has asked :func:`~mmkw.ops.modes.is_observed`.

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
    if not backend.are_constants(x, seen, cells, bias, *operands.tensors):
        return None
    dtype = modes.autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != cells.dtype:
        # PyTorch says what is wrong.
        return None
    if x.dtype not in STORED:
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
        learning: The attention. It or what it sees needs a gradient.
        cells: As in :func:`~mmkw.ops.apply_mixed`.
        grid: As there.
        sample_map: As there.
        bias: As there.

    Returns:
        None where the compiled kernels cannot do all of this.
    """
    parameters = learning.parameters
    dtype = modes.autocast_dtype(x)
    if (dtype or x.dtype) not in STORED or seen.dtype not in STORED:
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
    images = x.to(settings.dtype)
    bias = bias if bias is None or dtype is None else bias.to(dtype)
    with modes.without_autocast(x):
        # Autograd need not keep what is averaged, unless it is the images.
        given = None if images is seen else average(seen, sample_map.channel_dim)
        operands = images, given, cells, bias, chosen.token_tensor, *parameters
        return _Learn.apply(*operands, chosen, learning.with_parameters(None))


class _Learn(torch.autograd.Function):
    """The layer as autograd sees it. Averages are given if they are not of the images."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Tensor | None,
        cells: Tensor,
        bias: Tensor | None,
        token_tensor: Tensor | None,
        *arguments: Any,
    ) -> Tensor:
        *tensors, chosen, learning = arguments
        parameters, settings = Parameters(*tensors), chosen.settings
        is_tokens = settings.sample_map.channel_dim == -1
        pooled = torch.ops.mmkw.average(x, is_tokens) if given is None else given.contiguous()
        whole = learning.with_parameters(parameters)
        attention, saved = compiled_attention.forward(pooled, whole)
        count_batch(learning.norm)
        kept: list[Tensor | None] = []
        mixing = chosen.mixing_of(cells)
        result = apply_in_parts(x, attention, bias, None, settings, mixing, kept)
        needs = ctx.needs_input_grad
        of_average = needs[0 if given is None else 1]
        read, ctx.unread = Unread.apart(parameters, learning.norm, (of_average, *needs[5:]))
        ctx.save_for_backward(x, cells, bias, pooled, attention, *read, *saved, *kept)
        ctx.chosen, ctx.learning, ctx.averages_x = chosen, learning, given is None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cells, bias, pooled, attention, *tensors = ctx.saved_tensors
        last, end = len(Parameters._fields), len(Parameters._fields) + len(Saved._fields)
        parameters, saved = ctx.unread.joined(tensors[:last]), Saved(*tensors[last:end])
        needs, chosen, learning = ctx.needs_input_grad, ctx.chosen, ctx.learning
        if torch.is_grad_enabled() or modes.is_seen_through(grad, x, cells):
            ctx.unread.check()
            given = None if ctx.averages_x else pooled

            def compute(x: Tensor, given: Tensor | None, *rest: Any) -> Tensor:
                cells, bias, *parameters = rest
                if given is None:
                    given = average(x, chosen.settings.sample_map.channel_dim)
                whole = learning.with_parameters(Parameters(*parameters))
                attention = attend_plainly(given, whole)
                return apply_plainly(x, attention, cells, bias, None, chosen.settings)

            operands = x, given, cells, bias, *parameters
            with modes.without_autocast(x):
                found = recorded.gradients(
                    compute, operands, (*needs[:4], *needs[5 : 5 + last]), grad
                )
            return *found[:4], None, *found[4:], None, None

        of_attention: list[Tensor] = []

        def through(grad_attention: Tensor) -> Tensor | None:
            whole = learning.with_parameters(parameters)
            of_attention[:] = compiled_attention.backward(grad_attention, pooled, whole, saved)
            if not ctx.averages_x or not needs[0]:
                return None
            return (of_attention[0] / (x.numel() // pooled.numel())).to(x.dtype)

        need = Needs(needs[0], True, needs[3])
        kept = tensors[end:]
        with modes.without_autocast(x):
            of_x, _, of_bias, _ = backward_in_parts(
                chosen, need, grad, x, attention, cells, None, kept, through
            )
        of_given, *of_parameters = (
            value if is_needed else None
            for value, is_needed in zip(of_attention, (needs[1], *needs[5:]))
        )
        # The gradient of the cells goes through the token that the layers share.
        return of_x, of_given, None, of_bias, None, *of_parameters, None, None
