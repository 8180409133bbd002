"""Half as wide a ResNet18: a network that lacks capacity on these images."""

_base_ = './mask-rcnn_r18_fpn_mini-coco.py'

model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64]))
