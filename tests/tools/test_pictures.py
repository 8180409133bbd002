"""Pictures of attentions, of the temperature and of the paper's results show right numbers."""

import importlib
import json
import sys

import command_util
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmkw.engine.building import build_model
from mmkw.layers import Attention
from mmkw.layers.dynamic_layers import DynamicLayer

DETECTOR = """
_base_ = '{root}/configs/demo/mask-rcnn_kw1x-r18_fpn_annealed_mini-coco.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32]),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=5)),
)
"""
SEGMENTOR = """
_base_ = '{root}/configs/demo/fpn_kw1x-r18_mini-coco-semantic.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=16),
)
"""
CLASSIFIER = """
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=3, mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmkw.KWResNet', depth=18, base_channels=8, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=64),
)
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')
]
test_dataloader = dict(dataset=dict(dataset=dict(pipeline=pipeline)))
"""


@pytest.fixture
def tool(root, monkeypatch):
    """Imports a script of the analysis tools or of the benchmarks."""
    for folder in ('analysis_tools', 'benchmarks'):
        monkeypatch.syspath_prepend(str(root / 'tools' / folder))
    return importlib.import_module


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """A folder of two folders, each with two crops of a photograph."""
    data = pytest.importorskip('skimage.data', reason='the photographs are scikit-image data')
    folder = tmp_path_factory.mktemp('photographs')
    for label, photograph in (('cat', data.chelsea()), ('coffee', data.coffee())):
        (folder / label).mkdir()
        for top in (0, 100):
            crop = photograph[top : top + 96, 100:180]
            cv2.imwrite(str(folder / label / f'{top}.png'), crop)
    return folder


@pytest.fixture
def trained(root, tmp_path):
    """Writes a config and a checkpoint of random weights: (config, path of the checkpoint)."""

    def make(text, temperature=0.0, **changes):
        path = tmp_path / 'config.py'
        path.write_text(text.format(root=root))
        config = Config.fromfile(path)
        config.merge_from_dict(changes)
        model = build_model(config)
        # Under the statistics that norms start with, activations vanish.
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.momentum = 1.0
        with torch.no_grad():
            model.backbone(torch.randn(4, 3, 96, 80))
        meta = dict(temperature=temperature, dataset_meta=dict(classes=('a',), palette=[(0, 0, 0)]))
        torch.save(dict(meta=meta, state_dict=model.state_dict()), tmp_path / 'weights.pth')
        return config, str(tmp_path / 'weights.pth')

    return make


def test_at_temperature_1_every_mixture_is_one_cell(tool, trained, photographs):
    pytest.importorskip('mmdet', reason='the config is for it')
    attention = tool('attention')
    config, checkpoint = trained(DETECTOR, temperature=1.0)
    model = attention.load_model(config, checkpoint)
    images = attention.find_images([photographs / 'cat'])
    records = attention.record(model, attention.test_pipeline(config), images)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DynamicLayer)}
    assert records.keys() == layers.keys() and len(layers) == 14
    for name, one in records.items():
        assert one.spread == one.directions == 0 and one.count == 2
        expected = torch.zeros_like(one.mean)
        for mixture, cell in enumerate(layers[name].share.assigned):
            expected[mixture, cell] = 1
        assert torch.equal(one.mean, expected)
    content = attention.numbers(records, {})
    assert content['warehouses']['backbone stage1']['usage'] == [1.0] * 56
    # The layers of the fourth stage, which this network lacks, would take the other cells.
    assert content['warehouses']['backbone stage3']['usage'] == [1.0] * 27 + [0.0] * 20
    assert content['warehouses']['backbone stage1']['classes'] == {}


def test_means_equal_a_loop_over_the_library_s_own_inference(tool, trained, photographs):
    apis = pytest.importorskip('mmdet.apis', reason='the config is for it')
    attention = tool('attention')
    config, checkpoint = trained(DETECTOR)
    images = attention.find_images([photographs])
    assert [image.label for image in images] == ['cat', 'cat', 'coffee', 'coffee']
    counts = attention.class_counts(images)
    model = attention.load_model(config, checkpoint)
    records = attention.record(model, attention.test_pipeline(config), images)
    content = attention.numbers(records, counts)

    theirs = apis.init_detector(config, checkpoint, device='cpu', palette='random')
    seen = {}
    for name, module in theirs.named_modules():
        if isinstance(module, Attention):
            layer = seen.setdefault(name.removesuffix('.attention'), [])
            module.register_forward_hook(lambda m, i, alpha, layer=layer: layer.append(alpha[0]))
    for image in images:
        apis.inference_detector(theirs, str(image.path))
    assert all(len(alphas) == 4 for alphas in seen.values())
    classes = {}
    for name, alphas in seen.items():
        alphas = torch.stack(alphas).double().numpy()
        own = content['layers'][name]
        np.testing.assert_allclose(own['mean'], alphas.mean(0), atol=2e-6)
        assert own['magnitude'] == pytest.approx(np.abs(alphas).mean(), rel=1e-5)
        spread = alphas.std(0).mean() / np.abs(alphas).mean()
        assert own['spread'] == pytest.approx(spread, rel=1e-3) and spread > 1e-3
        differing = (alphas - alphas.mean(0)).reshape(4, -1)
        variances = np.linalg.svd(differing, compute_uv=False) ** 2
        directions = variances.sum() ** 2 / (variances**2).sum()
        assert own['directions'] == pytest.approx(directions, rel=1e-3) and 1 <= directions <= 3
        part = classes.setdefault(own['warehouse'], {'cat': 0, 'coffee': 0, 'usage': 0})
        part['cat'] += alphas[:2].mean(0).sum(0)
        part['coffee'] += alphas[2:].mean(0).sum(0)
        part['usage'] += np.abs(alphas).mean(0).sum(0)
    assert set(classes) == set(content['warehouses'])
    for warehouse, part in classes.items():
        own = content['warehouses'][warehouse]
        for label in ('cat', 'coffee'):
            np.testing.assert_allclose(own['classes'][label], part[label], atol=1e-5)
        np.testing.assert_allclose(own['usage'], part['usage'], atol=1e-5)


def test_directions_are_counted(tool):
    attention = tool('attention')
    for count in (1, 2, 5):
        one = attention.Record('', 0)
        for image in range(60):
            alpha = torch.full((3, 4), 0.5, dtype=torch.float64)
            alpha.view(-1)[image // 2 % count] += (-1) ** image
            one.add(alpha, None)
        assert one.directions == pytest.approx(count)


@pytest.mark.parametrize('method', ['kernelwarehouse', 'dyconv', 'odconv'])
def test_a_classifier_s_attentions_are_recorded(tool, trained, photographs, method):
    pytest.importorskip('mmpretrain.models', reason='the config is for it')
    attention = tool('attention')
    options = {'model.backbone.method': method, 'model.backbone.cell_num_ratio': 2}
    config, checkpoint = trained(CLASSIFIER, **options)
    model = attention.load_model(config, checkpoint)
    assert float(model.data_preprocessor.std[0]) == 60
    images = attention.find_images([photographs])
    records = attention.record(model, attention.test_pipeline(config), images)
    layers = [m for m in model.modules() if isinstance(m, DynamicLayer)]
    assert len(records) == len(layers) >= 16
    assert all(one.count == 4 for one in records.values())
    # The softmax of random logits is nearly even.
    spread = (min if method == 'kernelwarehouse' else max)(one.spread for one in records.values())
    assert spread > 1e-3


def test_a_segmentor_s_attentions_from_the_command_line(root, trained, photographs, tmp_path):
    pytest.importorskip('mmseg', reason='the config is for it')
    config, checkpoint = trained(SEGMENTOR)
    script = 'tools/analysis_tools/attention.py'
    out = tmp_path / 'out'
    paths = [photographs / 'cat/0.png', photographs / 'coffee']
    command = [sys.executable, script, config.filename, checkpoint, *paths, '--out-dir', out]
    result, output = command_util.run(root, *command)
    assert result.returncode == 0, output
    names = ['images', 'usage', *(f'attention_backbone_stage{i}' for i in range(1, 5))]
    assert sorted(p.stem for p in out.glob('*.png')) == sorted(names)
    for path in out.glob('*.png'):
        assert cv2.imread(str(path)).std() > 10
    content = json.loads((out / 'attention.json').read_text())
    assert content['images'] == 3 and content['classes'] == {}
    for warehouse, own in content['warehouses'].items():
        layers = [v for v in content['layers'].values() if v['warehouse'] == warehouse]
        total = sum(v['magnitude'] * np.size(v['mean']) for v in layers)
        assert sum(own['usage']) == pytest.approx(total, rel=1e-4)
        mixtures = sum(len(v['mean']) for v in layers)
        row = f'| {warehouse} | {len(layers)} | {mixtures} | {len(own["usage"])} | '
        assert row in result.stdout


def test_mistakes_are_named(tool, trained, photographs, tmp_path):
    pytest.importorskip('mmdet', reason='the config is for it')
    attention = tool('attention')
    config, checkpoint = trained(DETECTOR)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    with pytest.raises(SystemExit, match='nowhere does not exist'):
        attention.find_images(['nowhere'])
    with pytest.raises(SystemExit, match=r'empty holds no image .*one folder a class'):
        attention.find_images([photographs, tmp_path / 'empty'])
    with pytest.raises(SystemExit, match=r'Checkpoint none\.pth does not exist'):
        attention.load_model(config, 'none.pth')
    model = attention.load_model(config, checkpoint)
    with pytest.raises(SystemExit, match=r'bad\.png cannot be read as an image'):
        attention.record(
            model, attention.test_pipeline(config), [attention.Image(tmp_path / 'bad.png')]
        )
    torch.save(model.backbone.state_dict(), tmp_path / 'backbone.pth')
    with pytest.raises(SystemExit, match='no warehouse for this ResNet under'):
        attention.load_model(config, str(tmp_path / 'backbone.pth'))
    state = model.state_dict()
    del state['backbone.layer1.0.conv1.attention.fc2.bias']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(SystemExit, match=r'layer1\.0\.conv1\.attention\.fc2\.bias'):
        attention.load_model(config, str(tmp_path / 'part.pth'))
    # The static twin.
    config.model.backbone.type = 'mmkw.ResNet'
    del config.model.backbone.cell_num_ratio
    with pytest.raises(SystemExit, match='builds no dynamic layer'):
        attention.load_model(config, checkpoint)


def test_classes_need_folders_for_all(tool, photographs):
    attention = tool('attention')
    images = attention.find_images([photographs])
    assert attention.class_counts(images) == {'cat': 2, 'coffee': 2}
    assert attention.class_counts(images[:2]) == {}
    mixed = attention.find_images([photographs, photographs / 'cat/0.png'])
    assert attention.class_counts(mixed) == {}


def test_the_temperature_curve_is_the_hook_s(tool, root):
    temperature = tool('temperature')
    config = Config.fromfile(root / 'configs/demo/mask-rcnn_kw1x-r18_fpn_annealed_mini-coco.py')
    hook = temperature.find_hook(config)
    epochs, values = temperature.curve(hook, config)
    assert (epochs[0], epochs[50], epochs[-1]) == (0, 0.5, 6)
    assert (values[0], values[50], values[100], values[-1]) == (1, 0.5, 0, 0)
    (line,) = temperature.draw(hook, config).axes[0].lines
    assert list(line.get_ydata()) == values
    config.custom_hooks = [
        dict(type='mmkw.TemperatureHook', length=8, by_epoch=False, begin=0.8, end=0.2)
    ]
    iterations, values = temperature.curve(temperature.find_hook(config), config)
    assert iterations == list(range(11))
    assert values[4] == pytest.approx(0.5) and values[8:] == pytest.approx([0.2] * 3)
    static = Config.fromfile(root / 'configs/demo/mask-rcnn_r18_fpn_mini-coco.py')
    with pytest.raises(SystemExit, match='has no temperature hook'):
        temperature.find_hook(static)


def test_the_paper_s_results_are_drawn(tool, root, monkeypatch, tmp_path):
    pytest.importorskip('mmdet', reason='the static ResNet is its')
    published = tool('published_results')
    rows = {row['budget']: row for row in published.RESULTS['networks']['ResNet18']}
    for budget, backbone in (
        ('static', dict(type='mmkw.ResNet')),
        ('1x', dict(type='mmkw.KWResNet')),
        ('4x', dict(type='mmkw.KWResNet', cell_num_ratio=4)),
    ):
        config = Config(dict(default_scope='mmdet', model=dict(backbone, depth=18)))
        model = build_model(config, on_meta=True)
        classifier = 512 * 1000 + 1000
        counted = sum(p.numel() for p in model.parameters()) + classifier
        assert counted == rows[budget]['parameters']
    monkeypatch.setattr(sys, 'argv', ['published_results.py', str(tmp_path / 'p.png')])
    published.main()
    assert cv2.imread(str(tmp_path / 'p.png')).std() > 10
    imagenet, box, mask = published.draw().axes
    assert len(imagenet.lines) == 11 and len(box.lines) == len(mask.lines) == 6
    assert list(box.lines[0].get_ydata()) == [41.8, 42.4]
    assert list(mask.lines[1].get_ydata()) == [36.4]
