_base_ = [
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(backbone=_base_.backbone)
