"""The scripts of ``tools/deployment`` run on a trained model, and report what they say."""

import importlib
import sys

import pytest
import torch
from command_util import run
from mmengine.config import Config

from mmkw.engine.building import build_model

CONFIG = """
_base_ = '{root}/configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
data_root = '{data}/'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32]),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=5)),
)
test_dataloader = dict(dataset=dict(data_root=data_root))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
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


def test_the_export_script_is_the_command(root):
    result, output = run(root, sys.executable, 'tools/deployment/export.py', '-h')
    assert result.returncode == 0 and 'usage: mmkw export' in output and '--half' in output
