_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/backbones/kw4x-mobilenet-v2.py',
]

model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
