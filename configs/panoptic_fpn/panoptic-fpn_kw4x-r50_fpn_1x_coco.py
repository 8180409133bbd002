_base_ = ['./panoptic-fpn_r50_fpn_1x_coco.py', '../_base_/backbones/kw4x-r50.py']

model = dict(backbone=_base_.backbone)
