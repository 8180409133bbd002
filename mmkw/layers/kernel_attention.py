"""The attentions of the comparators: they mix the whole kernels of one layer.

Dynamic Convolution (DY-Conv, https://arxiv.org/abs/1912.03458), CondConv
(https://arxiv.org/abs/1904.04971) and Omni-dimensional Dynamic Convolution (ODConv,
https://arxiv.org/abs/2209.07947), from their papers.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import modes
from .attention import (
    LayerAttention,
    as_precise,
    attention_width,
    check_width,
    norm_of,
    normalised,
)
from .partition import LayerShare, WarehouseOptions

# The logits of DY-Conv and ODConv are divided by this when training starts, and in the end by 1.
HIGHEST = 30.0


class KernelAttention(LayerAttention):
    """The attention of a comparator.

    Args:
        in_channels: Channels of the layer's input.
        share: The layer's share in its warehouse, which is its own.
        num_cells: The kernels of the layer.
        options: Options of the warehouse.
        norm_cfg: Config of the norm over the hidden units, where the method has one.

    Raises:
        PlanError: If the attention would have too many parameters.
        ValueError: If ``norm_cfg`` is not the config of a norm for vectors.
    """

    gain: float

    def __init__(
        self,
        in_channels: int,
        share: LayerShare,
        num_cells: int,
        options: WarehouseOptions,
        norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_cells = num_cells
        self._make(share, options, norm_cfg)
        self.reset_parameters()

    def _make(self, share: LayerShare, options: WarehouseOptions, norm_cfg: dict) -> None:
        raise NotImplementedError

    def _attend(self, pooled: Tensor) -> Any:
        raise NotImplementedError

    @property
    def _heads(self) -> list[Any]:
        """The last layers. With weights and biases of zero all kernels get the same attention."""
        raise NotImplementedError

    @torch.no_grad()
    def begin(self, tau: float) -> None:
        """See :class:`~mmkw.layers.attention.LayerAttention`."""
        super().begin(tau)
        for head in self._heads:
            head.weight.zero_()
            head.bias.zero_()

    @property
    def _divisor(self) -> float:
        """What the logits are divided by: 1 at temperature 0."""
        return 1 + (HIGHEST - 1) * self.temperature

    def forward(self, pooled: Tensor) -> Any:
        """Computes the attentions in the precision of the parameters, also under autocast.

        Args:
            pooled: Tensor[batch, in_channels], the average of the layer's input over space.

        Returns:
            Tensor[batch, 1, kernels], or :class:`Scales`.
        """
        with modes.without_autocast(pooled):
            first = next(module for module in self.children() if isinstance(module, nn.Linear))
            return self._attend(as_precise(pooled, first))

    def extra_repr(self) -> str:
        """The number of kernels."""
        return f'kernels={self.num_cells}'


class DYAttention(KernelAttention):
    """DY-Conv: two linear layers with a ReLU between them, and a softmax over the kernels."""

    gain = 1.0

    def _make(self, share: LayerShare, options: WarehouseOptions, norm_cfg: dict) -> None:
        # A stem has three channels. Fewer units than kernels could not tell them apart.
        width = max(int(self.in_channels * options.reduction), self.num_cells)
        check_width(width, share, options)
        self.fc1 = nn.Linear(self.in_channels, width)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(width, self.num_cells)

    @property
    def _heads(self) -> list[Any]:
        return [self.fc2]

    def _attend(self, pooled: Tensor) -> Tensor:
        logits = self.fc2(self.relu(self.fc1(pooled)))
        return (logits / self._divisor).softmax(1).unsqueeze(1)


class CondAttention(KernelAttention):
    """CondConv: one linear layer and a sigmoid, the routing weights. It has no temperature."""

    def _make(self, share: LayerShare, options: WarehouseOptions, norm_cfg: dict) -> None:
        self.fc = nn.Linear(self.in_channels, self.num_cells)
        # At the start every kernel has the weight 1/2.
        self.gain = 2 / self.num_cells

    @property
    def _heads(self) -> list[Any]:
        return [self.fc]

    def _attend(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled).sigmoid().unsqueeze(1)


class Scales(NamedTuple):
    """What ODConv's attention gives every image.

    Attributes:
        kernels: Tensor[batch, 1, kernels], the attentions of the kernels.
        inputs: Tensor[batch, in_channels].
        outputs: Tensor[batch, out_channels]; None for depthwise convolutions.
        taps: Tensor[batch, *kernel_size]; None for kernels of size one.
    """

    kernels: Tensor
    inputs: Tensor
    outputs: Tensor | None
    taps: Tensor | None


class ODAttention(KernelAttention):
    """ODConv: a linear layer, a norm and a ReLU, and after these up to four linear heads.

    Input channels, filters and taps in space have a sigmoid, the kernels a softmax. Depthwise
    convolutions have no head for filters, kernels of size one none for taps, and a single kernel
    has none for kernels. The modules have the published names.
    """

    def _make(self, share: LayerShare, options: WarehouseOptions, norm_cfg: dict) -> None:
        kernel, width = share.kernel, attention_width(self.in_channels, options)
        check_width(width, share, options)
        self._kernel_size = kernel.kernel_size
        taps = math.prod(kernel.kernel_size)
        is_depthwise = kernel.in_channels == 1 and kernel.out_channels == self.in_channels
        self.fc = nn.Linear(self.in_channels, width, bias=False)
        self.bn = norm_of(norm_cfg, width)
        self.relu = nn.ReLU()
        self.channel_fc = nn.Linear(width, self.in_channels)
        self.filter_fc = None if is_depthwise else nn.Linear(width, kernel.out_channels)
        self.spatial_fc = nn.Linear(width, taps) if taps > 1 else None
        self.kernel_fc = nn.Linear(width, self.num_cells) if self.num_cells > 1 else None
        # At the start every sigmoid is 1/2.
        sigmoids = (self.channel_fc, self.filter_fc, self.spatial_fc)
        self.gain = 2.0 ** sum(head is not None for head in sigmoids)

    @property
    def _heads(self) -> list[Any]:
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    def _attend(self, pooled: Tensor) -> Scales:
        hidden = self.relu(normalised(self.bn, self.fc(pooled)))
        divisor = self._divisor
        if self.kernel_fc is None:
            # Computed from the input, so that a program has one for every image.
            kernels = torch.ones_like(hidden[:, :1])
        else:
            kernels = (self.kernel_fc(hidden) / divisor).softmax(1)
        inputs = (self.channel_fc(hidden) / divisor).sigmoid()
        outputs = None
        if self.filter_fc is not None:
            outputs = (self.filter_fc(hidden) / divisor).sigmoid()
        taps = None
        if self.spatial_fc is not None:
            taps = (self.spatial_fc(hidden) / divisor).sigmoid().unflatten(1, self._kernel_size)
        return Scales(kernels.unsqueeze(1), inputs, outputs, taps)
