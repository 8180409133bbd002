_base_ = ['../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py', '../_base_/backbones/mobilenet-v2.py']

model = dict(backbone=_base_.backbone, neck=dict(in_channels=[24, 32, 96, 1280]))
