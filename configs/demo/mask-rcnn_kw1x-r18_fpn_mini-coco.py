"""The Mask R-CNN with a KernelWarehouse 1x ResNet18, from random weights as for short training."""

_base_ = [
    './mask-rcnn_r18_fpn_mini-coco.py',
    '../_base_/recipes/from-scratch.py',
]

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1, **_base_.from_scratch))
# The best of 1e-3, 2e-3 and 4e-3 in box AP, for the static network as well (docs/evidence.md).
optim_wrapper = dict(optimizer=dict(lr=0.002))
