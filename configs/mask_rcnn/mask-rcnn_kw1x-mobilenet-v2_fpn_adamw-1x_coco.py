_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py',
    '../_base_/backbones/kw1x-mobilenet-v2.py',
]

# The stem is frozen, with the first blocks; its warehouse learns, as all the others.
model = dict(
    backbone=dict(_base_.backbone, freeze_warehouses=False),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
