"""ConvNeXt, static and with KernelWarehouse.

The static network is written here because neither mmdet nor mmseg has one. Its modules have the
same names as in the published KernelWarehouse checkpoints, which mmpretrain's do not have.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import MODELS
from ..sharing import convnext_rule
from .building import Option, make_dynamic, static_arguments
from .classifiers import name_in_classifiers
from .residual import checkpoint_blocks, drop_path_rates
from .static import check_stages, refuse_small_images

EPS = 1e-6
_PARTS_IN_MMPRETRAIN = {
    'depthwise_conv': 'dwconv',
    'pointwise_conv1': 'pwconv1',
    'pointwise_conv2': 'pwconv2',
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of Tensor[batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises; the shape stays the same."""
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, pointwise expansion, GELU, pointwise projection, layer scale.

    Args:
        channels: Channels in and out.
        drop_path_rate: Stochastic depth, in [0, 1).
        layer_scale_init_value: Start of the layer scale ``gamma``; 0 means no layer scale.
    """

    def __init__(self, channels: int, drop_path_rate: float, layer_scale_init_value: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels, eps=EPS)
        self.pwconv1 = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(4 * channels, channels, 1)
        self.gamma = None
        if layer_scale_init_value > 0:
            self.gamma = nn.Parameter(torch.full((1, channels, 1, 1), layer_scale_init_value))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps Tensor[batch, channels, height, width] to the same shape."""
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y)


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """`ConvNeXt <https://arxiv.org/abs/2201.03545>`_ as a backbone.

    It reads the checkpoints of the original release and of mmpretrain. Their names are translated.
    Pointwise weights may come from linear layers or from 1x1 convolutions.

    Args:
        arch: ``tiny``, ``small``, ``base`` or ``large``, or
            ``dict(depths=[...], channels=[...])`` with one value per stage.
        in_channels: Channels of the image.
        out_indices: Indices of the stages whose output is returned, from 0. Each output has its
            own norm.
        drop_path_rate: Stochastic depth of the last block, in [0, 1). The rates grow linearly from
            0 at the first block. Or a sequence with one rate per block.
        layer_scale_init_value: Start of the layer scale; 0 means no layer scale.
        gap_before_final_norm: Whether outputs are averaged over the image before their norm, as in
            classifiers. They are then Tensor[batch, channels].
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages.
        with_cp: Whether the blocks' activations are recomputed in the backward pass, to save
            memory.
        init_cfg: As in MMEngine. By default convolutions start truncated normal, with a standard
            deviation of 0.02.

    Raises:
        ValueError: If an argument is unknown or out of its range.
        TypeError: If ``drop_path_rate`` is neither a number nor a sequence of numbers.
    """

    arch_settings = {
        'tiny': dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768]),
        'small': dict(depths=[3, 3, 27, 3], channels=[96, 192, 384, 768]),
        'base': dict(depths=[3, 3, 27, 3], channels=[128, 256, 512, 1024]),
        'large': dict(depths=[3, 3, 27, 3], channels=[192, 384, 768, 1536]),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | Sequence[float] = 0.0,
        layer_scale_init_value: float = 1e-6,
        gap_before_final_norm: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = dict(type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0)
        super().__init__(init_cfg)
        depths, channels = self._arch(arch)
        stages = len(depths)
        check_stages(stages, out_indices, frozen_stages)
        self.out_indices = tuple(out_indices)
        self.gap_before_final_norm = gap_before_final_norm
        # The norm of a whole ImageNet network is that of the last output.
        norm = f'norm{max(self.out_indices)}' if gap_before_final_norm else 'norm'
        self._register_load_state_dict_pre_hook(partial(convnext_names, norm=norm))
        self._checkpoint_filter = name_in_classifiers
        self.frozen_stages = frozen_stages

        stem = nn.Conv2d(in_channels, channels[0], 4, stride=4)
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(stem, LayerNorm2d(channels[0], eps=EPS))]
        )
        for before, after in pairwise(channels):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(before, eps=EPS), nn.Conv2d(before, after, 2, stride=2))
            )
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(ConvNeXtBlock(width, next(rates), layer_scale_init_value) for _ in range(depth))
            )
            for depth, width in zip(depths, channels)
        )
        for index in self.out_indices:
            self.add_module(f'norm{index}', LayerNorm2d(channels[index], eps=EPS))
        if with_cp:
            checkpoint_blocks([block for stage in self.stages for block in stage])
        # Convolutions without padding divide the image by 4 in the stem, then by 2 per stage.
        refuse_small_images(self, 4 * 2 ** (stages - 1))
        self._freeze_stages()

    def _arch(self, arch: str | dict) -> tuple[list[int], list[int]]:
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ValueError(f'arch must be one of {list(self.arch_settings)}, got {arch!r}.')
            arch = self.arch_settings[arch]
        if set(arch) != {'depths', 'channels'} or len(arch['depths']) != len(arch['channels']):
            raise ValueError(
                f'arch must be dict(depths=[...], channels=[...]) of one length, got {arch}.'
            )
        return list(arch['depths']), list(arch['channels'])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps Tensor[batch, in_channels, height, width] to the outputs of ``out_indices``."""
        outs = []
        for index, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(downsample(x))
            if index in self.out_indices:
                norm = getattr(self, f'norm{index}')
                if self.gap_before_final_norm:
                    outs.append(norm(x.mean((2, 3), keepdim=True)).flatten(1))
                else:
                    outs.append(norm(x))
        return tuple(outs)

    def train(self, mode: bool = True) -> 'ConvNeXt':
        """Sets the mode, but keeps frozen stages in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.downsample_layers[0]]
        for index in range(self.frozen_stages):
            frozen += [self.downsample_layers[index], self.stages[index]]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


@MODELS.register_module()
def KWConvNeXt(
    arch: str | dict = 'tiny',
    *,
    method: str = 'kernelwarehouse',
    cell_num_ratio: Option = None,
    cell_inplane_ratio: Option = 1.0,
    cell_outplane_ratio: Option = 1.0,
    reduction: Option = None,
    nonlocal_basis_ratio: Option = 1.0,
    spatial_partition: bool | Sequence[bool] | None = None,
    attention_norm_cfg: dict | None = None,
    start_tau: float = 0.0,
    freeze_warehouses: bool = True,
    keep_weights: bool = False,
    **static: Any,
) -> ConvNeXt:
    """Builds a ConvNeXt whose convolutions are all dynamic, with the paper's twelve warehouses.

    Args:
        arch: As in :class:`ConvNeXt`.
        method: ``kernelwarehouse``, or for comparison ``dyconv``, ``condconv`` or ``odconv``: then
            the layers are :class:`~mmkw.DYConv2d`, :class:`~mmkw.CondConv2d` or
            :class:`~mmkw.ODConv2d`, each with its own kernels. Of the warehouse options they take
            ``cell_num_ratio`` and ``reduction`` alone, but ``condconv`` no ``reduction``.
        cell_num_ratio: The budget ``b``: cells per mixture. Above 0, by default 1. Of the other
            methods the number of kernels, by default 4, 8 and 1. This and the next five options
            are one value, or one per warehouse.
        cell_inplane_ratio: Input channels of a cell, relative to the greatest common divisor of the
            layers' input channels (per group). In (0, 1].
        cell_outplane_ratio: Output channels of a cell, relative to the greatest common divisor of
            the layers' output channels. In (0, 1].
        reduction: Hidden width of the attention, relative to the layer's input channels. Above 0,
            by default 1/16, of ``dyconv`` 1/4. At least 16 units are used, of ``dyconv`` as many as
            kernels.
        nonlocal_basis_ratio: Size of the basis through which a layer attends to the cells of other
            layers, relative to the number of those cells. In (0, 1]; 1 means no basis.
        spatial_partition: Whether cells have size 1 in space, as by default. Otherwise they have
            the kernel's size.
        attention_norm_cfg: Norm of the attentions: ``BN1d``, ``SyncBN``, ``LN`` or ``GN``. By
            default LN, as in the rest of the network.
        start_tau: The temperature at which a static checkpoint starts the network: 0, or 1 with a
            :class:`~mmkw.engine.hooks.TemperatureHook`.
        freeze_warehouses: Whether a warehouse is frozen while all its layers are frozen. If not,
            every warehouse learns.
        keep_weights: Whether training from scratch begins with the static network's random kernels,
            as with those of a static checkpoint. By default cells and attentions have the random
            start of the paper, which needs a :class:`~mmkw.engine.hooks.TemperatureHook`.
        **static: The other arguments of :class:`ConvNeXt`.

    Returns:
        The network.

    Raises:
        PlanError: If the warehouse options do not fit the network.
        ValueError: If an argument of ConvNeXt is out of its range.
        TypeError: If ``drop_path_rate`` is neither a number nor a sequence of numbers.

    Example:
        >>> backbone = mmkw.KWConvNeXt('tiny', drop_path_rate=0.4, out_indices=(1, 2, 3))
    """
    arguments = dict(locals())
    with static_arguments(arguments):
        network = ConvNeXt(arch, **static)
    return make_dynamic(network, convnext_rule(network), arguments)


def convnext_names(state_dict: dict[str, Tensor], prefix: str, *_: Any, norm: str = 'norm') -> None:
    """Translates a state dict of the original ConvNeXt or of mmpretrain's.

    mmpretrain's names of a block's convolutions become the original names. Pointwise weights of
    linear layers become those of 1x1 convolutions. A layer scale of shape ``(channels,)`` becomes
    ``(1, channels, 1, 1)``.

    Args:
        state_dict: Changed in place.
        prefix: The network's place in the state dict. Other names do not change.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
        norm: What the norm before the ImageNet classifier, ``norm``, is called here.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        name = re.sub(
            r'\b(depthwise_conv|pointwise_conv1|pointwise_conv2)\b',
            lambda match: _PARTS_IN_MMPRETRAIN[match[1]],
            key[len(prefix) :],
        )
        name = re.sub(r'^norm\.', f'{norm}.', name)
        if not isinstance(value, Tensor):
            pass  # A later check refuses it and names it.
        elif name.endswith(('pwconv1.weight', 'pwconv2.weight')) and value.dim() == 2:
            value = value[:, :, None, None]
        elif name.endswith('gamma') and value.dim() == 1:
            value = value.view(1, -1, 1, 1)
        state_dict[prefix + name] = value
