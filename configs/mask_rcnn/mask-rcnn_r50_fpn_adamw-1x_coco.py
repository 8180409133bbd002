_base_ = ['../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py', '../_base_/backbones/r50.py']

model = dict(backbone=_base_.backbone)
