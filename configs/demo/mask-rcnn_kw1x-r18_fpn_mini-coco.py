"""The Mask R-CNN with a KernelWarehouse 1x ResNet18, from random weights as in the paper."""

_base_ = './mask-rcnn_r18_fpn_mini-coco.py'

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1))
custom_hooks = [
    dict(type='mmkw.TemperatureHook', length=1),
    dict(type='mmkw.IterationSeedHook'),
]
