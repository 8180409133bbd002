"""The neck takes the last three stages: the norm of an output that nobody reads never learns."""

_base_ = [
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    '../_base_/backbones/kw1x-convnext-tiny.py',
    '../_base_/schedules/layer_decay.py',
]

model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = _base_.layer_decay
