_base_ = [
    './mask-rcnn_convnext-tiny_fpn_adamw-1x_coco.py',
    '../_base_/backbones/kw1x-convnext-tiny.py',
]

model = dict(backbone=_base_.backbone)
