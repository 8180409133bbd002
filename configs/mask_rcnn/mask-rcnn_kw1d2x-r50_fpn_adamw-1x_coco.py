_base_ = ['../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py', '../_base_/backbones/kw1d2x-r50.py']

model = dict(backbone=dict(_base_.backbone, drop_path_rate=[0.1] * 16))
