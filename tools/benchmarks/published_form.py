"""The operator as it was published: the baseline of the benchmarks.

One product of all attentions and the warehouse, a permutation of the assembled kernels, one grouped
convolution of the whole batch; autograd keeps what it needs. The layers, their attentions and their
cells are mmkw's own: only what is computed from them differs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkw.layers import dynamic_layers
from mmkw.ops import SampleLinear
from mmkw.ops.kernels import assembled_shape


def published_operator(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    sample_map: Any,
    bias: Tensor | None = None,
    scales: None = None,
) -> Tensor:
    """Takes the place of :func:`mmkw.ops.apply_mixed` for cells of one place and 2D kernels.

    KernelWarehouse does not scale taps, so ``scales`` is None.
    """
    batch, (out_channels, in_channels, *size) = len(x), assembled_shape(cells.shape[1:], grid)
    mixed = torch.mm(attention.flatten(0, 1), cells.flatten(1))
    *spatial, out_blocks, in_blocks = grid
    taps = torch.Size(spatial).numel()
    mixed = mixed.view(batch, taps, out_blocks, in_blocks, *cells.shape[1:3])
    kernels = mixed.permute(0, 2, 4, 3, 5, 1).reshape(batch, out_channels, in_channels, *size)
    if isinstance(sample_map, SampleLinear):
        y = torch.bmm(x.flatten(1, -2), kernels.squeeze(-1).transpose(1, 2))
        y = y.view(*x.shape[:-1], out_channels)
    else:
        y = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            kernels.flatten(0, 1),
            None,
            sample_map.stride,
            sample_map.padding,
            sample_map.dilation,
            batch * sample_map.groups,
        )
        y = y.view(batch, out_channels, *y.shape[2:])
    if bias is None:
        return y
    return y + (bias if isinstance(sample_map, SampleLinear) else bias.view(-1, 1, 1))


@contextmanager
def published_form() -> Iterator[None]:
    """Has every dynamic layer compute by the published operator."""
    none = dict.fromkeys(('apply_to_image', 'learn'), lambda *_: None)
    replaced = {'apply_mixed': published_operator, **none}
    ours = {name: getattr(dynamic_layers, name) for name in replaced}
    vars(dynamic_layers).update(replaced)
    try:
        yield
    finally:
        vars(dynamic_layers).update(ours)
