"""The Mask R-CNN with a KernelWarehouse 1x ResNet18, from random weights as in the paper.

The paper's start is for long training. In these six epochs it is below the static network, and
mask-rcnn_kw1x-r18_fpn_mini-coco.py is above it: docs/evidence.md.
"""

_base_ = './mask-rcnn_r18_fpn_mini-coco.py'

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1))
custom_hooks = [
    dict(type='mmkw.TemperatureHook', length=1),
    dict(type='mmkw.IterationSeedHook'),
]
