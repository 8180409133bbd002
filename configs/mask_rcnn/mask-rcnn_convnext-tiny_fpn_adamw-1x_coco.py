_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py',
    '../_base_/backbones/convnext-tiny.py',
    '../_base_/schedules/layer_decay.py',
]

model = dict(backbone=_base_.backbone, neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = _base_.layer_decay
# Steps at 9 and 11.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]
