"""Networks of torchvision and timm, with their own weights, and layers that pad by themselves."""

import copy
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmkw
from mmkw.layers.static_classes import Kind, kind_of
from mmkw.sharing import mobilenet_v2_rule

if find_spec('torchvision'):
    # PyPI's wheel of torchvision has the operators of CUDA's torch only. Networks do not need them.
    try:
        import torchvision.models  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition('.')[0] == 'torchvision']:
            del sys.modules[name]
        for operator in ('nms', 'qnms'):
            torch.library.define(
                f'torchvision::{operator}', '(Tensor boxes, Tensor scores, float limit) -> Tensor'
            )


def models(library):
    if library == 'torchvision':
        return vars(pytest.importorskip('torchvision.models', exc_type=ImportError))
    timm = pytest.importorskip('timm', exc_type=ImportError)
    return {
        name: lambda name=name, **kw: timm.create_model(name, **kw) for name in timm.list_models()
    }


def with_statistics(network):
    """Random statistics and parameters: some parts start with zeros."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


NETWORKS = [
    ('torchvision', 'mobilenet_v2', dict(width_mult=0.25), 'features.18.0'),
    ('torchvision', 'mobilenet_v3_small', dict(width_mult=0.5), 'classifier.0'),
    ('torchvision', 'squeezenet1_1', {}, 'features.3.expand3x3'),
    ('timm', 'convnext_atto', dict(depths=(1, 1, 1, 1)), 'stages.0.blocks.0.conv_dw'),
    ('timm', 'vit_tiny_patch16_224', dict(img_size=32, depth=2), 'blocks.0.mlp.fc1'),
    ('timm', 'tf_mobilenetv3_small_minimal_100', {}, 'blocks.1.0.conv_pw'),
]


@pytest.mark.parametrize('library, name, arguments, dynamic', NETWORKS)
def test_two_lines_keep_the_weights_and_train(library, name, arguments, dynamic):
    torch.manual_seed(0)
    static = with_statistics(models(library)[name](num_classes=10, **arguments))
    network = mmkw.convert(copy.deepcopy(static))
    assert hasattr(network.get_submodule(dynamic), 'cells')
    last = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))][-1]
    assert 10 in last.weight.shape, 'the classifier is static'
    x, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        expected = static(x)
        torch.testing.assert_close(
            network(x), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
        )
    for each in (static, network):
        optimizer = torch.optim.SGD(each.parameters(), 1e-3)
        losses = []
        for _ in range(10):
            loss = F.cross_entropy(each(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    # The static network's own file starts the network, too.
    network.load_state_dict(static.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(x), static(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    'library, name, budget, parameters',
    [
        ('torchvision', 'resnet18', 1, 11_932_148),
        ('torchvision', 'resnet18', 4, 45_862_085),
        ('torchvision', 'resnet50', 1, 28_052_310),
        ('timm', 'resnet50', 4, 102_015_144),
    ],
)
def test_resnets_are_those_of_the_paper(library, name, budget, parameters):
    with torch.device('meta'):
        network = mmkw.convert(models(library)[name](), cell_num_ratio=budget)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    'pointwise, options, parameters',
    [
        ('joint', {}, 5_168_146),
        ('separate', dict(cell_num_ratio=4), 11_379_382),
    ],
)
def test_torchvision_s_mobilenet_v2_can_be_that_of_the_paper(pointwise, options, parameters):
    with torch.device('meta'):
        network = models('torchvision')['mobilenet_v2']()
        plan = mmkw.SharingPlan.make(mobilenet_v2_rule(network, pointwise), **options)
        mmkw.convert(network, plan)
    assert sum(p.numel() for p in network.parameters()) == parameters


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        padding = []
        for size, k, s, d in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation
        ):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            padding += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Named(nn.Conv2d):
    def __init__(self, name, *arguments):
        super().__init__(*arguments)
        self.name = name


class WithState(nn.Linear):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer('scale', torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale


def of_libraries():
    """Layers of mmcv and timm that pad by themselves."""
    found = []
    if find_spec('mmcv'):
        from mmcv.cnn.bricks import Conv2dAdaptivePadding

        found.append(Conv2dAdaptivePadding)
    if find_spec('timm') and find_spec('torchvision'):
        from timm.layers import Conv2dSame

        found.append(Conv2dSame)
    return found


@pytest.mark.parametrize('kind', [Same, *of_libraries()])
@pytest.mark.parametrize(
    'stride, dilation, groups', [(1, 1, 1), (2, 1, 1), (2, 1, 4), (1, 2, 1), (3, 1, 1)]
)
def test_layers_that_pad_by_themselves(kind, stride, dilation, groups):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind(8, 8, (3, 4), stride, 1, dilation, groups)

        def forward(self, x):
            return self.layer(x)

    assert kind_of(kind) is Kind.PADS_BY_SIZE
    static = Network()
    plan = mmkw.SharingPlan.make([('layer', 'one')], cell_num_ratio=2)
    network = mmkw.convert(copy.deepcopy(static), plan)
    at_one = mmkw.convert(copy.deepcopy(static), mmkw.SharingPlan.make(plan.layers), start_tau=1)
    for size in ((9, 10), (7, 13), (4, 4)):
        x = torch.rand(2, 8, *size)
        torch.testing.assert_close(network(x), static(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(at_one(x), static(x), atol=1e-5, rtol=0)
    again = mmkw.to_static(at_one)
    assert type(again.layer) is kind
    torch.testing.assert_close(again(x), static(x), atol=1e-5, rtol=0)


def test_what_derived_classes_compute():
    assert kind_of(nn.Conv2d) is kind_of(Named) is kind_of(nn.Linear) is Kind.SAME_AS_TORCH
    assert kind_of(Standardised) is kind_of(WithState) is Kind.OTHER
    # Trying a class out takes no random numbers from the user.
    kind_of.cache_clear()
    torch.manual_seed(3)
    kind_of(Same)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_a_layer_that_computes_something_else_stays_static():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.standardised = Standardised(64, 64, 3)
            self.named = Named('mine', 64, 64, 3)

    network = mmkw.convert(Network())
    assert type(network.standardised) is Standardised
    assert hasattr(network.named, 'cells')
    with pytest.raises(mmkw.layers.PlanError, match=r'standardised.*is a Standardised'):
        mmkw.convert(Network(), mmkw.SharingPlan.make([('standardised', 'one')]))


def test_bad_input():
    with pytest.raises(TypeError, match=r'cell_num_ratio.*SharingPlan.make'):
        mmkw.convert(nn.Module(), mmkw.SharingPlan.make([('a', 'b')]), cell_num_ratio=2)
    with pytest.raises(TypeError, match='SharingPlan'):
        mmkw.convert(nn.Module(), [('a', 'b')])
    with pytest.raises(mmkw.layers.PlanError, match=r'itself a layer.*KWConv2d'):
        mmkw.convert(nn.Conv2d(64, 64, 3))
    for wrong in (0, -1, float('nan')):
        with pytest.raises(ValueError, match=f'length must be at least 1, got {wrong}'):
            mmkw.temperature_at(0, wrong)
    for wrong in ('2', None, True):
        with pytest.raises(TypeError, match=f'length must be a number, got {wrong!r}'):
            mmkw.temperature_at(0, wrong)
        with pytest.raises(TypeError, match=f'iteration must be a number, got {wrong!r}'):
            mmkw.temperature_at(wrong, 2)
    for wrong in (-2, float('nan'), -float('inf')):
        with pytest.raises(ValueError, match=f'iteration must be at least -1, .* got {wrong}'):
            mmkw.temperature_at(wrong, 3)
    with pytest.raises(TypeError, match=r'model must be a torch.nn.Module, got None'):
        mmkw.set_temperature(None, 0.5)
    for method in (['odconv'], ('dyconv', 'odconv')):
        with pytest.raises(mmkw.layers.PlanError, match='method must be one for all layers, one o'):
            mmkw.SharingPlan.make([('a', 'v'), ('b', 'w')], method=method)


def test_ultralytics():
    tasks = pytest.importorskip('ultralytics.nn.tasks', exc_type=ImportError)
    static = with_statistics(tasks.DetectionModel('yolo11n.yaml', verbose=False))
    network = mmkw.convert(copy.deepcopy(static))
    predictions = ('model.23.cv2.0.2', 'model.23.cv3.0.2', 'model.23.dfl.conv')
    for name, module in network.named_modules():
        assert not (name in predictions and hasattr(module, 'cells'))
    assert sum(hasattr(module, 'cells') for module in network.modules()) > 40
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = static(x)[0]
        scale = float(expected.abs().max())
        for each in (network, copy.deepcopy(network).fuse(verbose=False)):
            torch.testing.assert_close(each(x)[0], expected, atol=1e-5 * scale, rtol=0)
