"""The scripts of ``tools/deployment`` run on a trained model, and report what they say."""

import copy
import importlib
import sys

import pytest
import torch
from command_util import run
from mmengine.config import Config
from mmengine.registry import MODELS

from mmkw.engine.building import build_model

CONFIG = """
_base_ = '{root}/configs/demo/mask-rcnn_kw1x-r18_fpn_annealed_mini-coco.py'
data_root = '{data}/'
model = dict(
    type='mmdet.MaskRCNN',
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32]),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=5)),
)
test_dataloader = dict(dataset=dict(data_root=data_root))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
default_scope = None
load_from = 'where_training_started.pth'  # tests have nothing to do with it
"""


@pytest.fixture
def trained(root, mini_coco, tmp_path):
    """The paths of a config and of a checkpoint with random weights."""
    pytest.importorskip('mmdet', reason='the config is for it')
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'model.pth'
    config.write_text(CONFIG.format(root=root, data=mini_coco))
    torch.save(build_model(Config.fromfile(config)).state_dict(), checkpoint)
    return str(config), str(checkpoint)


def test_accuracy_and_cost(root, trained, mini_coco, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(root / 'tools/deployment'))
    curve = importlib.import_module('static_curve')
    options = ['--keep', '0', '100', '--shape', '64', '64', '--repeats', '1', '--most', '2']
    curve.main([*trained, str(mini_coco / 'train'), *options, '--work-dir', str(tmp_path)])
    output = capsys.readouterr().out
    rows = [row.split(' | ') for row in output[output.index('| dynamic layers |') :].splitlines()]
    names, _, static, kept, dynamic = rows
    assert [row[0] for row in rows[2:]] == ['| 0 %', '| 100 %', '| the dynamic model']
    accuracy, apart = names.index('coco/bbox_mAP'), names.index('outputs differ, %')
    # With all layers dynamic it is the dynamic model.
    assert kept[accuracy] == dynamic[accuracy] and kept[apart] == '0.00'
    assert '2 images, 0 of 14 layers stay dynamic' in output and float(static[apart]) > 0


@pytest.mark.parametrize('kind', ['mmkw.KWResNet', 'mmkw.ResNet'])
def test_accuracy_in_fewer_bits(root, trained, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.syspath_prepend(str(root / 'tools/deployment'))
    precision = importlib.import_module('precision')
    config, checkpoint = trained
    if kind == 'mmkw.ResNet':
        model = Config.fromfile(config)
        model.merge_from_dict({'model.backbone.type': kind})
        del model.model.backbone['cell_num_ratio']
        config, checkpoint = f'{tmp_path}/static.py', f'{tmp_path}/static.pth'
        model.dump(config)
        torch.save(build_model(model).state_dict(), checkpoint)
    precision.main([config, checkpoint, '--work-dir', str(tmp_path)])
    output = capsys.readouterr().out
    _, _, *rows = output[output.index('| backbone |') :].splitlines()
    assert [row.split(' | ')[0] for row in rows] == [f'| {name}' for name in precision.PRECISIONS]


def test_a_backbone_in_fewer_bits(root, monkeypatch):
    """Features come in float32, and differ by rounding alone, as a static network's do."""
    pytest.importorskip('mmdet', reason='the static network is its')
    monkeypatch.syspath_prepend(str(root / 'tools/deployment'))
    precision = importlib.import_module('precision')
    options = dict(depth=18, base_channels=8, stem_channels=8)
    images = torch.rand(2, 3, 64, 64)
    for kind in ('mmkw.ResNet', 'mmkw.KWResNet'):
        network = MODELS.build(dict(type=kind, **options))
        network.eval()
        with torch.no_grad():
            expected = network(images)
            for name in precision.PRECISIONS:
                copied = precision.InPrecision(copy.deepcopy(network), name)
                for feature, exact in zip(copied(images), expected, strict=True):
                    assert feature.dtype == torch.float32
                    apart = (feature - exact).norm() / exact.norm()
                    same = name == 'float32' or (name == 'int8' and kind == 'mmkw.ResNet')
                    assert apart == 0 if same else 1e-4 < apart < 0.05


def test_the_export_script_is_the_command(root):
    result, output = run(root, sys.executable, 'tools/deployment/export.py', '-h')
    assert result.returncode == 0 and 'usage: mmkw export' in output and '--half' in output
