_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py',
    '../_base_/backbones/odconv4x-r50.py',
]

# The paper trained its own ODConv on ImageNet for 300 epochs; those weights are not published, nor is
# its drop path. Here is none, as in the static ResNet50.
model = dict(backbone=_base_.backbone)
