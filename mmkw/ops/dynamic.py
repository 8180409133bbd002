"""The whole operator: mixes the kernel of every image and applies it, with little memory.

Autograd alone would keep the kernels of all images and layers. Here kernels exist for some images
at a time. The backward pass mixes them again, unless that takes too long; see
:meth:`~mmkw.ops.mixing.Mixing.is_kept`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, exported, modes, one_operator, recorded
from .compiled import pack_cells
from .gradient import Token
from .kernels import assembled_shape, mix_cells
from .mixing import Mixing
from .sample_conv import SampleConv, SampleLinear


class Settings(NamedTuple):
    """What does not depend on the images.

    Args:
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: The map that applies the kernels.
        dtype: Precision of the map.
    """

    grid: Sequence[int]
    sample_map: SampleConv | SampleLinear
    dtype: torch.dtype


class Chosen(NamedTuple):
    """What computes a call that learns.

    Args:
        settings: Of the layer.
        mixing_of: Makes what mixes from the cells.
        token: Of the cells; None if they do not learn.
    """

    settings: Settings
    mixing_of: Callable[[Tensor], Mixing]
    token: Token | None

    @staticmethod
    def of(settings: Settings, mixing_of: 'partial[Any]', cells: Tensor) -> 'Chosen':
        """Prepares for cells what :func:`~mmkw.ops.backend.mixing_of` has chosen."""
        token = Token.of(cells) if cells.requires_grad else None
        if token is not None and backend.packs(mixing_of, cells):
            packed = partial(token.packed, pack_cells, settings.sample_map)
            mixing_of = partial(mixing_of, packed=packed)
        return Chosen(settings, mixing_of, token)

    @property
    def token_tensor(self) -> Tensor | None:
        """What autograd sees of the token."""
        return None if self.token is None else self.token.tensor


class Needs(NamedTuple):
    """Which gradients a backward pass needs, beside that of the cells."""

    x: bool
    attention: bool
    bias: bool
    taps: bool = False


def apply_mixed(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: SampleConv | SampleLinear,
    bias: Tensor | None = None,
    taps: Tensor | None = None,
) -> Tensor:
    """Applies to every image the kernel that its attention mixes from the cells of a warehouse.

    The result equals ``sample_map(x, mix_cells(attention, cells, grid), bias)``, with the kernels
    times ``taps``. It can be differentiated as often as this expression. The expression itself
    computes if a transformation looks inside (``torch.func``, forward-mode differentiation).
    ``torch.export`` and ``torch.compile`` have forms of their own, of the same result.

    Args:
        x: Tensor[batch, ...], the images or tokens. Under autocast the images and the kernels are
            cast. Mixing has the precision of the cells, but where cells learn it multiplies in
            bfloat16, with sums in float32, where the processor does.
        attention: Tensor[batch, mixtures, cells].
        cells: ``Tensor[cells, cell_out, cell_in, *cell_kernel]``, or integers, as
            :func:`~mmkw.ops.backend.mixes_integers` allows.
        grid: Cells of the kernel along ``(*spatial, out, in)``.
        sample_map: The map that applies the kernels.
        bias: Bias of the map, shared by the images.
        taps: ``Tensor[batch, *kernel_size]``, what every image's kernel is multiplied by, place by
            place in space.

    Returns:
        The result of ``sample_map``.

    Raises:
        ValueError: If there are not as many attentions as images.
    """
    if not modes.is_exporting() and attention.shape[0] != x.shape[0]:
        raise ValueError(f'{len(x)} images have {len(attention)} attentions, not one each.')
    dtype = modes.autocast_dtype(x)
    if dtype is None:
        dtype = cells.dtype if cells.is_floating_point() else x.dtype
        return _apply(x, attention, cells, bias, taps, Settings(grid, sample_map, dtype))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        settings = Settings(grid, sample_map, dtype)
        return _apply(x.to(dtype), attention, cells, bias, taps, settings)


def _apply(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    bias: Tensor | None,
    taps: Tensor | None,
    settings: Settings,
) -> Tensor:
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, attention, cells, bias, taps)
    )
    mixing_of = backend.mixing_of(x, attention, cells, *settings, learning)
    if mixing_of is None or mixing_of.func is Mixing:
        # Attentions that a compiled kernel gave may be more precise than PyTorch's products take.
        attention = attention.to(cells.dtype)
    if mixing_of is None:
        return apply_plainly(x, attention, cells, bias, taps, settings)
    if not learning:
        return apply_in_parts(x, attention, bias, taps, settings, mixing_of(cells))
    chosen = Chosen.of(settings, mixing_of, cells)
    return _ApplyMixed.apply(x, attention, cells, bias, taps, chosen.token_tensor, chosen)


def apply_plainly(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    bias: Tensor | None,
    taps: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Computes :func:`apply_mixed` by PyTorch's operators, so that autograd records it."""
    grid, sample_map, dtype = settings
    if isinstance(sample_map, SampleConv) and exported.is_wanted():
        y = exported.convolve(x, attention, cells, grid, sample_map, taps)
        return y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))
    kernels = _mixed_plainly(attention, cells, grid)
    if taps is not None:
        kernels = kernels * _spread(taps, kernels)
    kernels = kernels.to(dtype)
    if isinstance(sample_map, SampleConv):
        # Of one output channel they may be a view, which PyTorch's gradients refuse.
        kernels = kernels.contiguous()
        if modes.makes_graph():
            return one_operator.convolve(sample_map, x, kernels, bias)
    return sample_map(x, kernels, bias)


def _spread(taps: Tensor, kernels: Tensor) -> Tensor:
    """The scales of the taps in the shape of kernels."""
    return taps[:, None, None].to(kernels.dtype)


def _mixed_plainly(attention: Tensor, cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Mixes by PyTorch's own operators, or by one of our operators in a compiled graph."""
    if backend.is_one_operator(attention, cells, grid):
        return torch.ops.mmkw.mix_cells(attention, cells, grid)
    return mix_cells(attention, cells, grid)


def apply_in_parts(
    x: Tensor,
    attention: Tensor,
    bias: Tensor | None,
    taps: Tensor | None,
    settings: Settings,
    mixing: Mixing,
    kept: list[Tensor | None] | None = None,
) -> Tensor:
    """Computes :func:`apply_mixed` block by block, without a record.

    Args:
        x: As there.
        attention: As there.
        bias: As there.
        taps: As there.
        settings: Of the layer.
        mixing: What mixes the cells.
        kept: Collects, for every block, its kernels or None.
    """
    _, sample_map, dtype = settings
    sample_map = mixing.applying(sample_map)
    results = []
    for block in mixing.blocks(attention):
        images, weights = _images(x, block), _images(attention, block)
        kernels = None
        if kept is not None:
            is_kept = mixing.is_kept(block, attention.shape[1])
            kernels = mixing.kernels(weights) if is_kept else None
            kept.append(kernels)
        for part, some in _scaled(mixing.mixed(weights, kernels), taps, block, kernels is None):
            results.append(sample_map(_images(images, part), some.to(dtype), bias))
    # No view, though its channels may lie last: activations may change it in place.
    return _joined(results).data


def _scaled(
    mixed: Iterable[tuple[slice, Tensor]], taps: Tensor | None, block: slice, in_place: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Scales the taps of mixed kernels.

    Args:
        mixed: The result of :meth:`~mmkw.ops.mixing.Mixing.mixed` for a block.
        taps: The scales of the whole batch; None changes nothing.
        block: The images of the block.
        in_place: Whether the memory of the kernels may be overwritten.
    """
    for part, kernels in mixed:
        if taps is not None:
            scales = _spread(taps[block][part], kernels)
            kernels = kernels.mul_(scales) if in_place else kernels * scales
        yield part, kernels


class _ApplyMixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        cells: Tensor,
        bias: Tensor | None,
        taps: Tensor | None,
        token_tensor: Tensor | None,
        chosen: Chosen,
    ) -> Tensor:
        kept: list[Tensor | None] = []
        mixing = chosen.mixing_of(cells)
        result = apply_in_parts(x, attention, bias, taps, chosen.settings, mixing, kept)
        ctx.save_for_backward(x, attention, cells, bias, taps, *kept)
        ctx.chosen = chosen
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, attention, cells, bias, taps, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or modes.is_seen_through(grad, x, attention, cells):
            gradients = recorded.gradients(
                partial(apply_plainly, settings=ctx.chosen.settings),
                (x, attention, cells, bias, taps),
                ctx.needs_input_grad[:5],
                grad,
            )
        else:
            need_x, need_attention, _, need_bias, need_taps = ctx.needs_input_grad[:5]
            needs = Needs(need_x, need_attention, need_bias, need_taps)
            of_x, of_attention, of_bias, of_taps = backward_in_parts(
                ctx.chosen, needs, grad, x, attention, cells, taps, kept
            )
            # The gradient of the cells goes through the token that the layers share.
            gradients = [of_x, of_attention, None, of_bias, of_taps]
        return *gradients, None, None


def backward_in_parts(
    chosen: Chosen,
    needs: Needs,
    grad: Tensor,
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    taps: Tensor | None,
    kept: Sequence[Tensor | None],
    through: Callable[[Tensor], Tensor | None] | None = None,
) -> tuple[Tensor | None, ...]:
    """Computes gradients block by block. That of the cells is added to the sum of their token.

    Args:
        chosen: What computes.
        needs: Which gradients are needed.
        grad: Gradient of the result.
        x: The images, as in :func:`apply_mixed`.
        attention: As there.
        cells: As there.
        taps: As there.
        kept: For every block, its kernels or None, as :func:`apply_in_parts` has collected them.
        through: Takes the gradient of the attention, which must be needed, and gives what it adds
            to all pixels of the gradient of the images, Tensor[batch, in_channels], or None. Only
            compiled maps add.

    Returns:
        The gradients of the images, the attention, the bias and the taps.
    """
    grid, sample_map, dtype = chosen.settings
    mixing = chosen.mixing_of(cells)
    sample_map = mixing.applying(sample_map)
    token = chosen.token
    total = token.sum(mixing) if token is not None and token.is_awaited() else None
    shape = assembled_shape(cells.shape[1:], grid)
    grads_x: list[Tensor] = []
    grads_attention: list[Tensor] = []
    grads_taps: list[Tensor] = []
    need_kernels = needs.attention or total is not None or needs.taps
    blocks = mixing.blocks(attention) if needs.x or need_kernels else []
    more: Tensor | None = None
    added: tuple[Tensor, ...] = ()
    for block, kernels in zip(blocks, kept):
        grad_block, x_block, weights = (_images(t, block) for t in (grad, x, attention))
        is_kept = kernels is not None
        if need_kernels:
            grad_kernels: Iterable[Tensor | Sequence[Tensor]] = (
                sample_map.backward_kernels(
                    _images(grad_block, part), _images(x_block, part), shape, mixing.scratch
                )
                for part in mixing.parts(weights)
            )
            if taps is not None:
                # In memory of their own, since those of mixing are used meanwhile.
                kernels = mixing.kernels(weights) if kernels is None else kernels
                grad_kernels = _through_taps(grad_kernels, kernels, taps[block], grads_taps)
            grad_attention, mixed = mixing.backward(grad_kernels, weights, total, kernels, needs.x)
            grads_attention.append(grad_attention)
        else:
            mixed = mixing.mixed(weights, kernels)
        if through is not None and len(blocks) == 1:
            more = through(grads_attention[0])
            added = () if more is None else (more,)
        if needs.x:
            for part, some in _scaled(mixed, taps, block, not is_kept):
                images = _images(grad_block, part), _images(x_block, part)
                grads_x.append(sample_map.backward_x(*images, some.to(dtype), *added))
    of_attention = _joined(grads_attention) if needs.attention else None
    # No view: autograd adds the gradient of the images' average to it in place.
    grad_x = _joined(grads_x).data if needs.x else None
    if through is not None and len(blocks) > 1:
        more = through(_joined(grads_attention))
        if grad_x is not None and more is not None:
            grad_x += _over_space(more, x.dim(), sample_map.channel_dim == -1)
    grad_bias = None
    if needs.bias:
        channel_dim = sample_map.channel_dim % grad.dim()
        grad_bias = grad.sum([dim for dim in range(grad.dim()) if dim != channel_dim])
    return grad_x, of_attention, grad_bias, torch.cat(grads_taps) if needs.taps else None


def _over_space(values: Tensor, dims: int, is_tokens: bool) -> Tensor:
    """Numbers of images as of all their pixels.

    Args:
        values: Tensor[batch, channels].
        dims: Dimensions of the images.
        is_tokens: Whether their channels are the last dimension, not the second.

    Returns:
        A tensor of so many dimensions, of size one in space.
    """
    space = [1] * (dims - 2)
    return values.view(len(values), *space, -1) if is_tokens else values.view(*values.shape, *space)


def _through_taps(
    grad_kernels: Iterable[Tensor | Sequence[Tensor]],
    kernels: Tensor,
    taps: Tensor,
    grads: list[Tensor],
) -> Iterator[list[Tensor]]:
    """Turns gradients of scaled kernels into those of the kernels, in place.

    Args:
        grad_kernels: Part by part, the gradients of the images' scaled kernels.
        kernels: Tensor[images, out, in, *kernel_size], before they are scaled.
        taps: Tensor[images, *kernel_size].
        grads: Collects the gradient of the taps.

    Yields:
        The gradients of a part, image by image.
    """
    images = iter(zip(kernels, taps))
    for part in grad_kernels:
        found = []
        # Image by image, since the product with the kernel is memory.
        for grad, (kernel, scales) in zip(part, images):
            # In the precision of the taps: a sum of many values.
            product = (grad.to(taps.dtype) * kernel).flatten(0, 1)
            grads.append(product.sum(0, keepdim=True))
            found.append(grad.mul_(scales.to(grad.dtype)))
        yield found


def _images(batch: Tensor, some: slice) -> Tensor:
    """Some images of a batch, mostly all. A view takes as long as a question to a small layer."""
    return batch if some.stop - some.start == batch.shape[0] else batch[some]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
