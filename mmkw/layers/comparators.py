"""What KernelWarehouse is compared with: dynamic convolutions of whole kernels.

They are dynamic layers with a warehouse of their own, whose cells are whole kernels, and with
another attention. So all that is true of dynamic layers is true of them.
"""

from typing import Any

from torch import Tensor, nn

from .dynamic_layers import ConvNd
from .kernel_attention import CondAttention, DYAttention, ODAttention


class DYConv2d(ConvNd):
    """Dynamic Convolution (Chen et al., 2020): Tensor[batch, channels, height, width].

    A softmax over the kernels, of ``cell_num_ratio`` kernels. Its temperature is ``1 + 29 * tau``:
    with :class:`~mmkw.engine.hooks.TemperatureHook` it falls from 30 to 1, as in the paper in the
    first ten epochs. All kernels have one bias. mmcv takes the layer as
    ``conv_cfg=dict(type='mmkw.DYConv2d')``.

    Args:
        *args: The arguments of ``torch.nn.Conv2d``, in the same order.
        device: As in ``torch.nn.Conv2d``.
        **kwargs: More arguments of ``torch.nn.Conv2d``, and ``cell_num_ratio``, the kernels, at
            least 2, by default 4, and ``reduction``, the hidden units of the attention relative to
            the input channels, by default 1/4. At least as many units as kernels are used.

    Raises:
        PlanError: If ``cell_num_ratio`` or ``reduction`` is out of range, or the layer too large.
        ValueError: If an argument of ``torch.nn.Conv2d`` is out of range.
        TypeError: If an argument is missing, unknown, or of a wrong type.

    Example:
        >>> layer = mmkw.DYConv2d(16, 32, 3, padding=1)
        >>> tuple(layer(torch.rand(2, 16, 10, 10)).shape), tuple(layer.cells.shape)
        ((2, 32, 10, 10), (4, 32, 16, 3, 3))
    """

    static_class = nn.Conv2d
    method = 'dyconv'
    attention_class = DYAttention


class CondConv2d(ConvNd):
    """CondConv (Yang et al., 2019): Tensor[batch, channels, height, width].

    A sigmoid for every kernel, of ``cell_num_ratio`` kernels, which the paper calls experts. It has
    no temperature. All kernels have one bias. mmcv takes the layer as
    ``conv_cfg=dict(type='mmkw.CondConv2d')``.

    Args:
        *args: The arguments of ``torch.nn.Conv2d``, in the same order.
        device: As in ``torch.nn.Conv2d``.
        **kwargs: More arguments of ``torch.nn.Conv2d``, and ``cell_num_ratio``, the kernels, at
            least 2, by default 8.

    Raises:
        PlanError: If ``cell_num_ratio`` is out of range, or the layer too large.
        ValueError: If an argument of ``torch.nn.Conv2d`` is out of range.
        TypeError: If an argument is missing, unknown, or of a wrong type.

    Example:
        >>> layer = mmkw.CondConv2d(16, 32, 3, padding=1, cell_num_ratio=3)
        >>> tuple(layer(torch.rand(2, 16, 10, 10)).shape), tuple(layer.cells.shape)
        ((2, 32, 10, 10), (3, 32, 16, 3, 3))
    """

    static_class = nn.Conv2d
    method = 'condconv'
    attention_class = CondAttention


class ODConv2d(ConvNd):
    """Omni-dimensional Dynamic Convolution (Li et al., 2022): ``Tensor[batch, channels, *size]``.

    Attentions of input channels, filters, taps in space and ``cell_num_ratio`` kernels, all from
    one squeeze of the input. Sigmoids and softmax have the temperature ``1 + 29 * tau``: with
    :class:`~mmkw.engine.hooks.TemperatureHook` it falls from 30 to 1, as in the paper in the first
    ten epochs. The filters' attentions do not scale the bias. State dicts with the published names
    load. mmcv takes the layer as ``conv_cfg=dict(type='mmkw.ODConv2d')``.

    Args:
        *args: The arguments of ``torch.nn.Conv2d``, in the same order.
        attention_norm_cfg: Norm of the attention: ``BN1d``, ``SyncBN``, ``LN`` or ``GN``.
        device: As in ``torch.nn.Conv2d``.
        **kwargs: More arguments of ``torch.nn.Conv2d``, and ``cell_num_ratio``, the kernels, by
            default 1, and ``reduction``, the hidden units of the attention relative to the input
            channels, by default 1/16. At least 16 units are used.

    Raises:
        PlanError: If ``cell_num_ratio`` or ``reduction`` is out of range, or the layer too large.
        ValueError: If an argument of ``torch.nn.Conv2d`` is out of range.
        TypeError: If an argument is missing, unknown, or of a wrong type.

    Example:
        >>> layer = mmkw.ODConv2d(16, 32, 3, padding=1, cell_num_ratio=4)
        >>> tuple(layer(torch.rand(2, 16, 10, 10)).shape), tuple(layer.cells.shape)
        ((2, 32, 10, 10), (4, 32, 16, 3, 3))
    """

    static_class = nn.Conv2d
    method = 'odconv'
    attention_class = ODAttention

    def _map(self, x: Tensor, seen: Tensor) -> Tensor:
        kernels, inputs, outputs, taps = self._attend(seen)
        if outputs is None:
            return self._mixed(_scaled(x, inputs), kernels, self.bias, taps)
        # By halves and twos, so that float16 reaches in between as far as a static layer: where
        # static weights begin, outputs are scaled by a half, and kernels are as much larger.
        y = _scaled(self._mixed(_scaled(x, inputs / 2), kernels, None, taps), outputs * 2)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def take_names(self, state_dict: dict[str, Any], prefix: str, cells: str) -> None:
        """See :class:`~mmkw.layers.dynamic_layers.DynamicLayer`.

        The authors' kernels are called ``weight``, of one dimension more than a static one. Their
        attentions are convolutions of size one.
        """
        kernels = state_dict.get(f'{prefix}weight')
        if isinstance(kernels, Tensor) and kernels.dim() == self.cells.dim():
            state_dict[cells] = state_dict.pop(f'{prefix}weight')
            for name, own in self.attention.state_dict().items():
                key = f'{prefix}attention.{name}'
                found = state_dict.get(key)
                if isinstance(found, Tensor) and own.dim() == 2 and found.shape[2:] == (1, 1):
                    state_dict[key] = found.flatten(1)


def _scaled(x: Tensor, scales: Tensor) -> Tensor:
    """Scales the channels of every image."""
    return x * scales.to(x.dtype)[:, :, None, None]
