"""MMSegmentation has the parts of this OCRNet, but no config of it."""

_base_ = [
    'mmseg::_base_/models/ocrnet_r50-d8.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    pretrained=None,
    backbone=_base_.backbone,
)
