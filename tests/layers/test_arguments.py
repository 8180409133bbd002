"""Any arguments and any input give the right answer or one error that names what is wrong."""

import copy
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mmkw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, PlanError
from mmkw.ops import mix_cells

TWINS = {KWConv1d: nn.Conv1d, KWConv2d: nn.Conv2d, KWConv3d: nn.Conv3d, KWLinear: nn.Linear}
DIMS = {KWConv1d: 1, KWConv2d: 2, KWConv3d: 3, KWLinear: 0}
NOT_NUMBERS = [None, 'three', True, 1.5, -1, 0, -(10**9), 2**31, 10**30, (), float('nan'), {}]
# Good values and wrong ones.
OPTIONS = dict(
    cell_num_ratio=(
        [
            1,
            2,
            4,
            0.5,
            np.int64(2),
            np.float32(1),
            np.float32(1 / 3),
            np.float32(0.2),
            Fraction(1, 2),
        ],
        [1.5, 0, -1, 1e308, 1e-320, 10**400, 10**9, float('nan'), None],
    ),
    cell_inplane_ratio=([1, 0.5], [1 / 3, 0, 2, '1']),
    cell_outplane_ratio=([1, 0.5, 0.25], [1e-300, -1]),
    reduction=([1 / 16, 1, 1e-9, np.float64(0.25)], [10**9, 0, np.True_]),
    nonlocal_basis_ratio=([1, 0.5], [0]),
    spatial_partition=([True, False], [1]),
    attention_norm_cfg=(
        [dict(type='BN1d'), dict(type='LN'), dict(type='GN', num_groups=4)],
        [
            dict(type='BN'),
            dict(type='IN1d'),
            dict(type='BN1d', track_running_stats=False),
            dict(type='BN1d', no_such=1),
            dict(type='LN', eps='1e-5'),
            dict(type='GN', num_groups=2, eps=float('nan')),
            dict(type='BN1d', eps=-1e-5),
            dict(type='BN1d', momentum='0.1'),
            dict(type='BN1d', momentum=1.5),
            dict(type='LN', requires_grad='no'),
            dict(type=None),
            dict(type='None'),
            dict(),
            None,
            'BN1d',
        ],
    ),
    dtype=([None, torch.float64], [torch.int32, torch.complex64, 'float32']),
)


def mostly(good, wrong):
    """Wrong values now and then: where all are wrong, only the first is looked at."""
    return st.integers(0, 39).flatmap(lambda roll: st.sampled_from(wrong) if roll == 7 else good)


@st.composite
def arguments(draw, layer):
    dims = DIMS[layer]
    few = st.integers(1, 3)
    if layer is KWLinear:
        drawn = {name: draw(mostly(few, NOT_NUMBERS)) for name in ('in_features', 'out_features')}
    else:
        groups = draw(mostly(st.integers(1, 3), NOT_NUMBERS))
        step = groups if isinstance(groups, int) and 0 < groups < 4 else 1
        channels = mostly(st.sampled_from([step, 2 * step, 4 * step]), [*NOT_NUMBERS, 5])
        several = few | st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple)
        wrong = [*NOT_NUMBERS, (1,) * (dims + 1), [2] * dims, (-1,) * dims, ('1',) * dims]
        drawn = dict(
            in_channels=draw(channels),
            out_channels=draw(channels),
            kernel_size=draw(mostly(several, wrong)),
            groups=groups,
        )
        optional = dict(
            stride=mostly(several, wrong),
            padding=mostly(several | st.sampled_from([0, 'same', 'valid']), wrong),
            dilation=mostly(several, wrong),
            padding_mode=mostly(
                st.sampled_from(['zeros', 'reflect', 'replicate', 'circular']), ['wrap', None]
            ),
        )
        chosen = draw(st.sets(st.sampled_from(sorted(optional))))
        drawn |= {name: draw(optional[name]) for name in sorted(chosen)}
    for name in draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=2)):
        good, wrong = OPTIONS[name]
        drawn[name] = draw(mostly(st.sampled_from(good), wrong))
    if draw(st.integers(0, 60)) == 7:
        drawn['no_such_argument'] = 1
    if draw(st.integers(0, 60)) == 7:
        del drawn[draw(st.sampled_from(sorted(drawn)))]
    return drawn


@st.composite
def shapes(draw, layer, channels):
    """Of an input: mostly of the right number of dimensions and channels."""
    sides = draw(
        st.lists(mostly(st.integers(3, 9), [0, 1]), min_size=DIMS[layer], max_size=DIMS[layer])
    )
    batch = draw(st.lists(st.integers(0, 3), min_size=1, max_size=1))
    features = [draw(mostly(st.just(channels), [0, 1, channels + 1]))]
    shape = batch + features + sides if DIMS[layer] else batch + draw(shapes_of_tokens) + features
    return shape[draw(mostly(st.just(0), [1, 2])) :]


shapes_of_tokens = st.lists(st.integers(0, 3), max_size=2)


def one_clear_error(error, drawn, name):
    """Its type is Python's for bad values, and it names an argument."""
    assert isinstance(error, (ValueError, TypeError)), (name, drawn, repr(error))
    names = r'|'.join([*drawn, 'in_\\w+', 'out_\\w+', 'kernel_size', 'expects an input'])
    assert re.search(rf'\b({names})\b', str(error)), (name, drawn, repr(error))


def attempt(function):
    try:
        return function(), None
    except Exception as error:
        return None, error


def expected_of(layer, twin, x, batched):
    """By the twin, once for an image, with the kernel that the image asks for."""
    images = x if batched else x[None]
    space = range(2, images.dim()) if DIMS[type(layer)] else range(1, images.dim() - 1)
    results = []
    for image in images:
        alone, dims = image[None], tuple(space)
        attention = layer.attention(alone.mean(dims) if dims else alone)
        kernel = mix_cells(attention, layer.cells, layer._grid)[0]
        twin.weight = nn.Parameter(kernel.view(twin.weight.shape))
        results.append(twin(alone)[0])
    return torch.stack(results) if batched else results[0]


@pytest.mark.parametrize('layer_type', TWINS, ids=lambda layer: layer.__name__)
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_arguments(layer_type, data):
    drawn = data.draw(arguments(layer_type))
    layer, error = attempt(lambda: layer_type(**drawn))
    own = {k: v for k, v in drawn.items() if k not in OPTIONS or k in ('dtype', 'no_such_argument')}
    twin, refused = attempt(lambda: TWINS[layer_type](**own, device='meta'))
    if error is not None:
        one_clear_error(error, drawn, layer_type.__name__)
        return
    assert refused is None, (drawn, refused)
    twin = TWINS[layer_type](**own).eval()
    layer.eval()
    channels = twin.in_features if layer_type is KWLinear else twin.in_channels
    dtype = next(layer.parameters()).dtype
    x = torch.randn(data.draw(shapes(layer_type, channels)), dtype=dtype)
    with torch.no_grad():
        y, error = attempt(lambda: layer(x))
        right, refused = attempt(lambda: twin(x))
        if error is not None:
            if refused is None:
                # A map without pixels that padding gives some.
                assert x.numel() == 0, (drawn, x.shape, repr(error))
                one_clear_error(error, drawn, layer_type.__name__)
            assert isinstance(error, (ValueError, RuntimeError)), (drawn, x.shape, repr(error))
            return
        assert refused is None, (drawn, x.shape, repr(refused))
        assert y.shape == right.shape
        if x.numel():
            if layer.bias is not None:
                twin.bias = layer.bias
            batched = x.dim() == 2 + DIMS[layer_type] or (layer_type is KWLinear and x.dim() > 1)
            torch.testing.assert_close(
                y, expected_of(layer, twin, x, batched), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: KWConv2d(10**5, 10**5, 3), 'out_channels=100000, in_channels=100000.*smaller'),
        (lambda: KWLinear(10**6, 10**6), 'out_features=1000000, in_features=1000000'),
        (lambda: KWConv2d(4, 4, 5000), r'25000000 mixtures.*spatial_partition=False'),
        (lambda: KWConv2d(4, 4, 3, cell_num_ratio=10**8), 'Lower cell_num_ratio=100000000;'),
        (lambda: KWConv2d(4, 4, 100, cell_num_ratio=20), 'or reduction=0.0625'),
        (lambda: KWConv2d(10**6, 1, 1, reduction=1.0), '1000000 hidden units.*reduction=1.0'),
        (lambda: KWLinear(1, 1, reduction=10**9), '1000000000 hidden units'),
        (lambda: KWConv2d(4, 4, 3, cell_num_ratio=1e308), 'cell_num_ratio must be from 1 / 10737'),
        (lambda: KWConv2d(4, 4, -1), 'kernel_size must be a whole number.* got -1'),
        (
            lambda: KWConv2d(4, 4, (3, 3, 3)),
            r'kernel_size must be one number or 2, got \(3, 3, 3\)',
        ),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(make, message):
    with pytest.raises(
        PlanError if 'whole' not in message and 'one' not in message else ValueError, match=message
    ):
        make()


def test_numpy_s_numbers_become_python_s():
    layer = KWConv2d(16, 16, 3, cell_num_ratio=np.int64(2), reduction=np.float32(0.25))
    options = layer.warehouse_manager.partitions[0].options
    found = options.cell_num_ratio, options.reduction
    assert found == (2, 0.25)
    assert [type(number) for number in found] == [int, float]
    twin = nn.Conv2d(np.int64(16), np.int64(16), 3)
    assert layer(torch.rand(1, 16, 5, 5)).shape == twin(torch.rand(1, 16, 5, 5)).shape


def test_arguments_are_not_changed():
    cfg, kernel_size = dict(type='LN', eps=1e-3), [3, 1]
    before = copy.deepcopy((cfg, kernel_size))
    KWConv2d(4, 4, kernel_size, attention_norm_cfg=cfg)
    assert (cfg, kernel_size) == before
