"""Half as wide a ResNet18, with a fourth of the weights in its backbone."""

_base_ = './mask-rcnn_r18_fpn_mini-coco.py'

model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64]))
