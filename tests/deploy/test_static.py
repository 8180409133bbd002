"""Static twins of dynamic networks: mean kernels, fitted norms, and layers that stay dynamic."""

import copy
import pickle

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from twin_networks import BACKBONES, build, outputs, thin_retinanet

import mmkw
from mmkw.cli.export import main
from mmkw.deploy import export, to_static
from mmkw.engine.building import build_model, read_config
from mmkw.layers.dynamic_layers import DynamicLayer
from mmkw.ops import mix_cells, modes


class Net(nn.Module):
    """Two warehouses: that of ``a`` and ``b``, and that of ``c``."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        return self.c(self.norm2(self.b(x)).relu())


PLAN = [('a', 'one'), ('b', 'one'), ('c', 'two')]


def dynamic_net():
    network = mmkw.convert(Net(), mmkw.SharingPlan.make(PLAN, cell_num_ratio=2), keep_weights=False)
    for norm in (network.norm, network.norm2):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return network


def batches(count=3, channels=4):
    """Images that differ in their means, and so in their kernels."""
    return [torch.randn(4, channels, 9, 9) + torch.randn(4, channels, 1, 1) for _ in range(count)]


@pytest.mark.parametrize(
    'layer, x',
    [
        (mmkw.KWConv2d(4, 8, 3, stride=2, groups=2, cell_num_ratio=2), torch.randn(5, 4, 9, 9)),
        (mmkw.KWConv2d(4, 8, 3, spatial_partition=False), torch.randn(5, 4, 9, 9)),
        (mmkw.KWLinear(4, 8, cell_inplane_ratio=0.5), torch.randn(5, 3, 4)),
    ],
)
def test_a_kernel_is_the_mean_over_the_images(layer, x):
    layer.eval()
    with torch.no_grad():
        attention = layer.attention(x.mean((2, 3)) if x.dim() > 3 else x.mean(1))
        kernels = mix_cells(attention, layer.cells, layer.share.grid)
    twin, report = to_static(layer, list(x.split([2, 3])))
    assert type(twin) is layer.static_class and isinstance(layer, DynamicLayer)
    mean = kernels.mean(0)
    torch.testing.assert_close(twin.weight, mean.view_as(twin.weight), atol=1e-6, rtol=1e-5)
    assert twin.bias is not layer.bias and torch.equal(twin.bias, layer.bias)
    spread = ((kernels - mean).square().sum() / len(x)).sqrt() / mean.norm()
    assert report.images == 5 and report.layers[0].spread == pytest.approx(float(spread), rel=1e-4)
    with torch.no_grad():
        apart = (twin(x) - layer(x)).norm() / layer(x).norm()
    assert report.distance == pytest.approx(float(apart), rel=1e-4) and report.distance > 0.01


KINDS = ('mmdet.ResNet', 'mmdet.SwinTransformer', 'mmkw.ConvNeXt', 'mmseg.VisionTransformer')


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind in BACKBONES])
@pytest.mark.parametrize('keep', [(), 'top 30 %', 'top 100 %'])
def test_where_all_images_are_alike_nothing_is_lost(kind, keep):
    """The class, the names and the outputs are those of the static and the dynamic network."""
    static, dynamic = build(kind, False), build(kind, True)
    side = 32 if kind == 'mmseg.VisionTransformer' else 64
    loader = [torch.randn(1, 3, side, side).repeat(2, 1, 1, 1)]
    twin, report = to_static(dynamic, loader, keep)
    assert report.distance < 1e-4 and max(layer.spread for layer in report.layers) < 1e-3
    assert not twin.training and dynamic.training
    kept = [layer for layer in report.layers if layer.kept]
    dynamic_layers = [m for m in twin.modules() if isinstance(m, DynamicLayer)]
    number = dict(zip(((), 'top 30 %', 'top 100 %'), (0, 0.3, 1)))[keep] * len(report.layers)
    assert number <= len(kept) == len(dynamic_layers) < number + 1
    assert type(twin) is type(static) and mmkw.is_converted(twin) == bool(kept)
    if not kept:
        assert {k: v.shape for k, v in twin.state_dict().items()} == {
            k: v.shape for k, v in static.state_dict().items()
        }
        static.load_state_dict(twin.state_dict())
        static.eval()
        for one, other in zip(outputs(kind, static), outputs(kind, twin), strict=True):
            torch.testing.assert_close(one, other)


def test_norms_give_the_means_that_they_gave():
    network, batch = dynamic_net(), 20 * batches(1)[0]
    network.eval()
    found = {}
    for name, model in (('dynamic', network), ('twin', to_static(network, [batch])[0])):
        moments = found[name] = []
        for norm in (model.norm, model.norm2):
            norm.register_forward_hook(lambda m, x, y, to=moments: to.append(y))
        with torch.no_grad():
            model(batch)
    for ours, expected in zip(found['twin'], found['dynamic'], strict=True):
        assert (ours - expected).abs().max() > 0.1
        means = (y.mean((0, 2, 3)) for y in (ours, expected))
        torch.testing.assert_close(*means, atol=1e-4, rtol=1e-3)


def test_a_static_part_keeps_its_statistics_to_the_bit():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), mmkw.KWConv2d(4, 4, 3))
    nn.init.uniform_(network[1].running_mean)
    before = copy.deepcopy(network[1].state_dict())
    twin, _ = to_static(network, batches())
    assert all(torch.equal(twin[1].state_dict()[name], value) for name, value in before.items())


def test_layers_that_vary_most_stay_with_the_cells_they_mix():
    network = dynamic_net().eval()
    _, everything = to_static(network, batches())
    assert [layer.spread for layer in everything.layers] == sorted(
        (layer.spread for layer in everything.layers), reverse=True
    )
    # One of three.
    loader = batches()
    twin, report = to_static(network, loader, 'top 30 %')
    assert [layer.kept for layer in report.layers] == [True, False, False]
    # Warehouse `two` has no layer left. `one` has the cells of both its layers.
    twin, report = to_static(network, loader, ['b'])
    assert type(twin.a) is nn.Conv2d and type(twin.c) is nn.Conv2d
    (cells,) = twin.warehouse_manager.weights
    assert torch.equal(cells, network.warehouse_manager.weights[0])
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(twin.b(x), network.b(x))
    assert 'b | ' in str(report) and '12 images, 1 of 3 layers stay dynamic' in str(report)
    # It is a converted network: it saves, loads and is made static in turn.
    twin.load_state_dict(copy.deepcopy(twin).state_dict())
    again, _ = to_static(twin, loader)
    assert not mmkw.is_converted(again)


class Features(Net):
    """As timm's networks, whose attentions look after the freezing of their warehouse."""

    def forward_features(self, x):
        return self.forward(x)


def test_what_stays_belongs_to_the_new_network():
    network = mmkw.convert(Features(), mmkw.SharingPlan.make(PLAN, cell_num_ratio=2)).eval()
    twin, _ = to_static(network, batches(), ['b'])
    # Nothing of the other network comes along.
    whole, alone = (len(pickle.dumps(each)) for each in (twin, twin.state_dict()))
    assert whole - alone < len(pickle.dumps(network)) / 4
    twin.b.attention.requires_grad_(False)
    twin.forward_features(torch.randn(2, 4, 9, 9)).sum().backward()
    assert not any(p.requires_grad for p in twin.warehouse_manager.parameters())


def test_layers_with_cells_of_their_own_may_stay():
    network = nn.Sequential(mmkw.KWConv2d(4, 4, 3), mmkw.KWConv2d(4, 4, 3))
    twin, _ = to_static(network, batches(), ['1'])
    assert type(twin[0]) is nn.Conv2d and type(twin[1]) is mmkw.KWConv2d


@pytest.fixture
def detector():
    registry = pytest.importorskip('mmdet.registry', reason='has the detector')
    init_default_scope('mmdet')
    return registry.MODELS.build(thin_retinanet('mmkw.KWResNet'))


CONFIG = """
default_scope = 'mmdet'
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor')),
]))
"""


def test_a_detector_by_the_command(detector, tmp_path, capsys):
    config, checkpoint, out = (str(tmp_path / name) for name in ('a.py', 'a.pth', 'a.pt2'))
    settings = Config.fromstring(CONFIG, '.py')
    settings.model = thin_retinanet('mmkw.KWResNet')
    settings.dump(config)
    torch.save(dict(state_dict=detector.state_dict()), checkpoint)
    rng = np.random.default_rng(0)
    for name in 'xyz':
        image = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f'{name}.png'), image)
    command = [config, checkpoint, out, '--form', 'static', '--shape', '64', '64']
    main([*command, '--fixed', 'size', '--images', str(tmp_path), '--keep', 'top 20 %'])
    output = capsys.readouterr().out
    assert '| backbone.layer1.0.conv1 | ' in output
    assert '3 images, 1 of 4 layers stay dynamic' in output and f'Written: {out}' in output
    for wrong, message in (
        ([], '--form static needs --images'),
        (['--images', str(tmp_path / 'no')], 'no is no image and no folder of images'),
        (['--images', str(tmp_path), '--keep', 'most'], "such as 'top 30 %'"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert message in capsys.readouterr().err


def thin_mask2former(root):
    """Its head has to be given the samples, too."""
    config = read_config(
        str(root / 'configs/mask2former/mask2former_kw1x-r50_8xb2-160k_ade20k-512x512.py')
    )
    config.model.backbone.update(depth=18, base_channels=8)
    head = config.model.decode_head
    head.update(in_channels=[8, 16, 32, 64], feat_channels=32, out_channels=32, num_queries=4)
    for transformer in (head.pixel_decoder.encoder, head.transformer_decoder):
        transformer.num_layers = 1
        for name, part in transformer.layer_cfg.items():
            part.embed_dims = 32
            part['feedforward_channels' if name == 'ffn_cfg' else 'num_heads'] = 4
    for encoding in (head.pixel_decoder.positional_encoding, head.positional_encoding):
        encoding.num_feats = 16
    return build_model(config)


def test_a_head_that_needs_more_than_the_images(root):
    structures = pytest.importorskip('mmseg.structures', reason='has the samples')
    model = thin_mask2former(root)
    shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (64, 64))
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    sample = structures.SegDataSample(metainfo=dict(**shapes, padding_size=[0] * 4))
    twin, report = to_static(model, [dict(inputs=[image], data_samples=[sample])])
    assert report.distance < 1e-4 and not any(isinstance(m, DynamicLayer) for m in twin.modules())


def test_export_writes_the_static_network(tmp_path, caplog):
    network, loader = dynamic_net(), batches()
    with caplog.at_level('INFO', 'mmkw'):
        parity = export(network, loader[0][:1], tmp_path / 'a.pt2', form='static', loader=loader)
    assert max(found.difference for found in parity) < 1e-5
    assert 'Kernels averaged over 12 images, 0 of 3' in caplog.text
    twin, _ = to_static(network, loader)
    program = torch.export.load(tmp_path / 'a.pt2').module()
    with torch.no_grad():
        torch.testing.assert_close(program(loader[1]), twin(loader[1]))
    for wrong in (dict(form='static'), dict(loader=loader), dict(keep='top 1 %')):
        with pytest.raises(ValueError, match=r"form='static' takes a loader"):
            export(network, loader[0], tmp_path / 'b.pt2', **wrong)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = mmkw.KWConv2d(4, 4, 3), mmkw.KWConv2d(4, 4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(network=nn.Linear(2, 2)), 'Linear has no dynamic layer'),
        (dict(network=mmkw.KWConv2d(4, 4, 3, device='meta')), 'KWConv2d has no values'),
        (dict(loader=iter(batches())), 'must be a DataLoader or a list .* got a list_iterator'),
        (dict(loader=[]), 'loader has no images'),
        (dict(loader=['a']), 'loader must give images, .* got a str'),
        (dict(loader=[dict(inputs=batches()[0])]), 'loader has dicts, which a Net does not take'),
        (dict(keep='30 %'), "keep must be such as 'top 30 %', .* got '30 %'"),
        (dict(keep='top 101 %'), 'from 0 to 100'),
        (dict(keep=None), 'by default none, got None'),
        (dict(keep=['a', 'z']), r"keep names \['z'\], .* they are \['a', 'b', 'c'\]"),
        (dict(network=Unused()), r"unused computes for none of the 12 .* keep=\['unused'\]"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(network=dynamic_net(), loader=batches())
    with pytest.raises(ValueError, match=message):
        to_static(**{**arguments, **change})


def test_what_computes_for_no_image_may_stay():
    twin, report = to_static(Unused(), batches(), ['unused'])
    assert type(twin.used) is nn.Conv2d and type(twin.unused) is mmkw.KWConv2d
    assert not any(isinstance(m, modes.BATCH_NORM) and m.training for m in twin.modules())
    assert report.layers[-1] == ('unused', 0.0, True)
