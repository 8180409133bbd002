_base_ = ['./panoptic-fpn_r50_fpn_1x_coco.py', '../_base_/backbones/kw1x-mobilenet-v2.py']

model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
