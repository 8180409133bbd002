"""Splits the fused projection of a transformer, so that the value projection is its own layer.

KernelWarehouse makes the value projection of a transformer dynamic, but not query and key.
Libraries keep all three in one matrix: ``nn.MultiheadAttention.in_proj_weight``, or the ``qkv`` of
windowed attention. The modules here replace the fused modules and read their state dicts.
"""

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.tracing import recorded
from ..layers.twins import Kernels, StandsForStatic, leave_static_twins
from ..ops import modes

# The windowed attention of mmdet and mmseg. It cuts images into windows before ``qkv``.
_WINDOWED = 'ShiftWindowMSA'


class SplitProjection(StandsForStatic):
    """A fused projection of queries, keys and values, split into two layers.

    Args:
        weight: Tensor[3 * channels, channels].
        bias: Tensor[3 * channels], or None.

    Attributes:
        query_key: Linear layer to the queries and keys.
        value: Linear layer to the values.
    """

    # The fused parameters have this prefix before ``weight`` and ``bias``.
    fused_prefix = ''

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        channels = weight.shape[1]
        kwargs: dict[str, Any] = dict(
            bias=bias is not None, device=weight.device, dtype=weight.dtype
        )
        self.query_key = nn.Linear(channels, 2 * channels, **kwargs)
        self.value = nn.Linear(channels, channels, **kwargs)
        for name, fused in (('weight', weight), ('bias', bias)):
            if fused is not None:
                parts = fused.detach().split([2 * channels, channels])
                for layer, part in zip((self.query_key, self.value), parts):
                    parameter = getattr(layer, name)
                    parameter.data.copy_(part)
                    parameter.requires_grad_(fused.requires_grad)

    @torch.no_grad()
    def static_twin(self) -> nn.Module:
        """Makes the fused module. Its value projection has the kernel of the one-to-one start."""
        value = self.value
        if isinstance(value, StandsForStatic):
            value = value.static_twin()
        twin = self._make_static()
        for name in ('weight', 'bias'):
            parts = [getattr(self.query_key, name), getattr(value, name)]
            if parts[0] is not None:
                learns = any(part.requires_grad for part in parts)
                if any(part.is_meta for part in parts):
                    # The value projection is sharded. Its twin has no values.
                    parts = [torch.empty(part.shape, device='meta') for part in parts]
                fused = nn.Parameter(torch.cat(parts), learns)
                twin.register_parameter(f'{self.fused_prefix}{name}', fused)
        self.hand_on(twin)
        return twin.train(self.training)

    def _make_static(self) -> nn.Module:
        """Makes the fused module, with its projection on the meta device."""
        raise NotImplementedError

    def counterparts(self, twin: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """See :class:`~mmkw.layers.twins.StandsForStatic`."""
        for name in ('weight', 'bias'):
            fused = getattr(twin, f'{self.fused_prefix}{name}')
            if fused is not None:
                dynamic = name == 'weight' and isinstance(self.value, StandsForStatic)
                value = self.value.cell_parameters if dynamic else [getattr(self.value, name)]
                yield fused, [getattr(self.query_key, name), *value]

    @torch.no_grad()
    def take_values(self, twin: nn.Module, kernels: Kernels) -> None:
        """See :class:`~mmkw.layers.twins.StandsForStatic`."""
        for name in ('weight', 'bias'):
            fused = getattr(twin, f'{self.fused_prefix}{name}')
            if fused is None:
                continue
            query_key, value = fused.split([len(fused) * 2 // 3, len(fused) // 3])
            own = getattr(self.query_key, name)
            own.copy_(query_key)
            own.requires_grad_(fused.requires_grad)
            if name == 'weight' and isinstance(self.value, StandsForStatic):
                self.value.take_kernel(value, fused.requires_grad, kernels)
            else:
                own = getattr(self.value, name)
                own.copy_(value)
                own.requires_grad_(fused.requires_grad)

    def split_state_dict(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Splits the fused parameters of a state dict in place. Without them it does nothing.

        Args:
            state_dict: The state dict of a network with this module or with the fused module.
            prefix: The module's place in the state dict.
        """
        for name in ('weight', 'bias'):
            fused = state_dict.pop(f'{prefix}{self.fused_prefix}{name}', None)
            if fused is not None:
                query_key, value = fused.split([len(fused) * 2 // 3, len(fused) // 3])
                state_dict[f'{prefix}query_key.{name}'] = query_key
                state_dict[f'{prefix}value.{name}'] = value


class _Images(threading.local):
    """The number of images that a thread computes: several may share a network."""

    number: Any = None

    def __reduce__(self) -> tuple[type, tuple]:
        """Copies and pickles are as new."""
        return _Images, ()


class WindowProjection(SplitProjection):
    """The ``qkv`` of windowed attention. All windows of an image share one value kernel.

    The attention of the value projection averages over all tokens of an image, padding included.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__(qkv.weight, qkv.bias)
        self._images = _Images()
        # Of all threads, for compiled graphs, which have no place for a number of every thread, and
        # for threads that compute this part alone, as autograd's do that compute it once more.
        self._images_of_all = 1

    def _make_static(self) -> nn.Module:
        channels = self.value.in_features
        return nn.Linear(channels, 3 * channels, self.query_key.bias is not None, device='meta')

    def count_images(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict) -> None:
        """Notes the number of images; a hook that runs before images are cut into windows."""
        images = (inputs[0] if inputs else named['query']).shape[0]
        self._images_of_all = images
        if not modes.is_compiling():
            self._images.number = images

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[images * windows, tokens, channels] to the same shape with 3 * channels."""
        number = None
        if not modes.is_compiling():
            # Taken once: the next count may be that of a compiled graph.
            number, self._images.number = self._images.number, None
        images = x.reshape(number or self._images_of_all, -1, x.shape[-1])
        return torch.cat([self.query_key(x), self.value(images).view(x.shape)], -1)


class SplitMultiheadAttention(SplitProjection):
    """A ``torch.nn.MultiheadAttention`` with a separate value projection.

    Args:
        attention: The fused module. Queries, keys and values must have the same channels.
            ``add_bias_kv`` and ``add_zero_attn`` must be false.

    Raises:
        ValueError: If the attention is of another kind.
    """

    fused_prefix = 'in_proj_'

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        if attention.in_proj_weight is None or attention.bias_k is not None:
            raise ValueError('Only attentions with one fused projection, without add_bias_kv.')
        if attention.add_zero_attn:
            raise ValueError('Only attentions without add_zero_attn.')
        super().__init__(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = attention.out_proj
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first

    def _make_static(self) -> nn.Module:
        twin = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.query_key.bias is not None,
            batch_first=self.batch_first,
            device='meta',
        )
        twin.out_proj = self.out_proj
        return twin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the same as ``torch.nn.MultiheadAttention``, for batches and single sequences.

        Args:
            query: Tensor[batch, queries, channels], or Tensor[queries, batch, channels] if not
                ``batch_first``. A single sequence has no batch dimension.
            key: Tensor[batch, keys, channels], with the dimensions in the order of ``query``.
            value: Tensor of the shape of ``key``.
            key_padding_mask: Tensor[batch, keys]. If boolean, true keys are ignored. Else it is
                added to the logits.
            need_weights: Whether the weights are returned. Without them the call is faster.
            attn_mask: Tensor[queries, keys] or Tensor[batch * heads, queries, keys]. If boolean,
                true places are ignored. Else it is added to the logits.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: A hint that ``attn_mask`` is causal. The mask is applied in either case.

        Returns:
            The result, of the shape of ``query``, and the weights or None. The weights are
            Tensor[batch, heads, queries, keys], or Tensor[batch, queries, keys] if averaged.

        Raises:
            RuntimeError: If ``is_causal`` comes without ``attn_mask``, as in PyTorch.
        """
        if any(map(modes.is_symbolic, (query, key, value))):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return recorded(self, query, key, value, *masks)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                'is_causal=True is a hint about attn_mask, which is None: give the mask, such as '
                'torch.nn.Transformer.generate_square_subsequent_mask(queries).'
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        maps = self.query_key.weight.chunk(2)
        biases = (None, None) if self.query_key.bias is None else self.query_key.bias.chunk(2)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (
                F.linear(query, maps[0], biases[0]),
                F.linear(key, maps[1], biases[1]),
                self.value(value),
            )
        )
        mask = self._mask(attn_mask, key_padding_mask, query)
        y, weights = self._attend(query, key, value, mask, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(query, key, value, mask, dropout), None
        logits = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(-1)
        weights = F.dropout(weights, dropout)
        return weights @ value, weights

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> Tensor | None:
        """The sum of the masks: Tensor[batch or 1, heads or 1, queries or 1, keys], or None."""
        masks = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            masks.append(attn_mask.unflatten(0, (len(query), -1)) if per_head else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None, :])
        total = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -torch.inf)
            total = mask if total is None else total + mask
        return total


def fused_projections(network: nn.Module) -> dict[str, nn.Module]:
    """The fused projections of a network that can be split, by name, in module order."""
    # In evaluation PyTorch's encoder reads the parameters of its attention.
    read = {m.self_attn for m in network.modules() if isinstance(m, nn.TransformerEncoderLayer)}
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module not in read:
            found[name] = module
        elif type(module).__name__ == _WINDOWED:
            found[f'{name}.w_msa.qkv'] = module.w_msa.qkv
    return found


def split_projections(network: nn.Module, names: list[str]) -> None:
    """Splits fused projections of a network in place. The network still reads old state dicts.

    Args:
        network: A network with fused projections.
        names: Names of the projections to split, from :func:`fused_projections`.

    Raises:
        ValueError: If a projection is of a kind that cannot be split.
    """
    for name in names:
        parent_name, _, child = name.rpartition('.')
        parent = network.get_submodule(parent_name)
        fused = getattr(parent, child)
        if isinstance(fused, nn.MultiheadAttention):
            split = SplitMultiheadAttention(fused)
        else:
            split = WindowProjection(fused)
            windows = network.get_submodule(parent_name.rpartition('.')[0])
            windows.register_forward_pre_hook(split.count_images, with_kwargs=True)
        setattr(parent, child, split.train(fused.training))
    if names:
        network._register_load_state_dict_pre_hook(_split_state_dict, with_module=True)


def _split_state_dict(
    network: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    leave_static_twins(network)
    for name, module in network.named_modules():
        if isinstance(module, SplitProjection):
            module.split_state_dict(state_dict, f'{prefix}{name}.')
