_base_ = [
    './mask-rcnn_mobilenet-v2_fpn_adamw-1x_coco.py',
    '../_base_/backbones/kw1x-mobilenet-v2.py',
]

model = dict(backbone=_base_.backbone)
