"""tools/train.py and tools/test.py with a config of MMSegmentation."""

import sys

import pytest
from command_util import run, scalars

pytest.importorskip('mmseg', reason='trains a segmentor')
SEGMENTATION = """
_base_ = '{root}/configs/demo/fpn_kw1x-r18_mini-coco-semantic.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=16),
)
train_dataloader = dict(batch_size=2, dataset=dict(data_root='{data}'))
val_dataloader = dict(dataset=dict(data_root='{data}'))
test_dataloader = dict(dataset=dict(data_root='{data}'))
test_evaluator = [
    dict(type='IoUMetric', iou_metrics=['mFscore'], prefix='second'),
    dict(type='IoUMetric', iou_metrics=['mIoU']),
]
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
custom_hooks = [dict(type='mmkw.TemperatureHook', length=4, by_epoch=False)]
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
"""


def test_a_segmentor_trains_and_is_tested(root, mini_coco, tmp_path):
    config = tmp_path / 'fpn_kw1x-r18.py'
    config.write_text(SEGMENTATION.format(root=root, data=mini_coco))
    command = [sys.executable, 'tools/train.py', config, '--work-dir', tmp_path / 'work']
    result, output = run(root, *command)
    assert result.returncode == 0, output
    temperatures = [s['temperature'] for s in scalars(tmp_path / 'work') if 'temperature' in s]
    assert temperatures == [0.75, 0.5] and 'mIoU' in output
    command = [sys.executable, 'tools/test.py', config, tmp_path / 'work/iter_2.pth']
    options = ['--work-dir', tmp_path / 'test', '--out', tmp_path / 'out', '--show-dir']
    result, output = run(root, *command, *options, tmp_path / 'pictures', '--tta')
    assert result.returncode == 0, output
    assert 'mIoU' in output
    assert len(list((tmp_path / 'out').glob('*.png'))) == 2
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 2
