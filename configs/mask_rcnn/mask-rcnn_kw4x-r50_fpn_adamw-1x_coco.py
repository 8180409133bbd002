_base_ = ['./mask-rcnn_r50_fpn_adamw-1x_coco.py', '../_base_/backbones/kw4x-r50.py']

model = dict(backbone=_base_.backbone)
