"""The paper's recipe for Mask R-CNN on COCO, but for the backbone."""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../datasets/coco_instance_detr-aug.py',
    '../schedules/adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
