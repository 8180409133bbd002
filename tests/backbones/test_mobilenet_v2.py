"""KWMobileNetV2: the table of the paper, both libraries, freezing."""

import pytest
import torch
from mmengine.registry import DefaultScope

from mmkw.backbones import KWMobileNetV2, MobileNetV2
from mmkw.layers import KWLinear
from mmkw.layers.dynamic_layers import DynamicLayer

pytest.importorskip('mmdet', reason="needs MMDetection's MobileNetV2")

LAST = [1] * 6 + [0.5, 1, 0.5]
BUDGETS = {
    '1x': dict(),
    '4x': dict(pointwise='separate', cell_num_ratio=4),
    '1/2x': dict(
        pointwise='last_stage',
        reduction=1 / 32,
        cell_num_ratio=LAST,
        cell_inplane_ratio=LAST,
        cell_outplane_ratio=LAST,
    ),
}
CELLS = {
    '1x': '9x(32,3) 36x(32,1) 34x(8,16) 78x(8,24) 18x(144,1) 42x(32,32) 27x(192,1) 102x(32,64) '
    '36x(384,1) 120x(32,96) 27x(576,1) 58x(160,160) 27x(960,1)',
    '4x': '36x(32,3) 144x(32,1) 44x(8,32) 4x(96,16) 8x(144,24) 72x(144,1) 28x(8,144) 12x(192,32) '
    '108x(192,1) 16x(32,192) 16x(384,64) 144x(384,1) 36x(32,384) 12x(576,96) 108x(576,1) '
    '44x(32,576) 12x(960,160) 108x(960,1) 80x(160,320)',
    '1/2x': '9x(32,3) 36x(32,1) 18x(144,1) 27x(192,1) 36x(384,1) 27x(576,1) 6x(480,80) 27x(960,1) '
    '40x(80,160)',
}
STATIC_CLASSIFIER = 1280 * 1000 + 1000


def classifier(budget):
    """Parameters of the ImageNet classifier: dynamic at 1/2x."""
    if budget != '1/2x':
        return STATIC_CLASSIFIER
    layer = KWLinear(1280, 1000, reduction=1 / 32, cell_num_ratio=0.5, cell_inplane_ratio=0.025)
    assert layer.cells.shape == (20, 1000, 32, 1)
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    'width, budget, parameters',
    [
        (1.0, '1/2x', 2_654_396),
        (1.0, '1x', 5_168_146),
        (1.0, '4x', 11_379_382),
        (0.5, '1/2x', 1_466_888),
        (0.5, '1x', 2_854_522),
        (0.5, '4x', 4_648_587),
    ],
)
def test_parameters_and_warehouses_of_the_paper(width, budget, parameters):
    with torch.device('meta'):
        network = KWMobileNetV2(width, **BUDGETS[budget])
    counted = sum(p.numel() for p in network.parameters()) + classifier(budget)
    assert counted == parameters
    shapes = [tuple(weight.shape) for weight in network.warehouse_manager.weights]
    if width == 1:
        assert ' '.join(f'{n}x({o},{i})' for n, o, i, *_ in shapes) == CELLS[budget]


@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_both_libraries(scope, budget):
    pytest.importorskip(scope)
    options = dict(BUDGETS[budget])
    if scope == 'mmseg':
        # It ends before the last 1x1 convolution; seventeen blocks share the rest.
        options.pop('reduction', None)
        options |= dict(out_indices=(1, 2, 4, 6), dilations=(1, 1, 1, 1, 1, 2, 4))
    with DefaultScope.overwrite_default_scope(scope):
        network = KWMobileNetV2(0.5, norm_eval=False, **options)
    assert type(network).__module__.startswith(f'{scope}.')
    network.init_weights()
    outs = network(torch.randn(2, 3, 64, 64))
    assert len(outs) == 4
    sum(o.square().mean() for o in outs).backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None]


@pytest.mark.parametrize('width', [0.35, 0.75, 1.4])
def test_other_widths(width):
    network = KWMobileNetV2(width)
    network.eval()
    assert all(o.isfinite().all() for o in network(torch.randn(1, 3, 64, 64)))


def test_frozen_stages():
    network = KWMobileNetV2(0.5, frozen_stages=1, norm_eval=True)
    network.train()
    trainable = {
        p.name: w.requires_grad
        for p, w in zip(
            network.warehouse_manager.partitions, network.warehouse_manager.weights, strict=True
        )
    }
    # The stem is frozen; the first stage's warehouses also serve the first block of the second.
    assert not trainable.pop('stem')
    assert all(trainable.values())
    for name, layer in network.named_modules():
        if isinstance(layer, DynamicLayer):
            frozen = name.startswith(('conv1', 'layer1.'))
            assert {p.requires_grad for p in layer.attention.parameters()} == {not frozen}


@pytest.mark.parametrize('kind', [MobileNetV2, KWMobileNetV2])
@pytest.mark.parametrize('wrong', [0, -1, float('nan'), float('inf'), '1', True, None])
def test_width_out_of_range_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=f'widen_factor must be a number above 0, got {wrong!r}'):
        kind(widen_factor=wrong)


def test_unknown_sharing_is_refused():
    with pytest.raises(ValueError, match=r"pointwise must be .*, got '1x'"):
        KWMobileNetV2(pointwise='1x')
