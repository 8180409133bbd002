"""Starts from the static ResNeXt."""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py'

weights = dict(type='Pretrained', checkpoint='open-mmlab://resnext50_32x4d')
static = dict(type='ResNeXt', depth=50, init_cfg=weights)
model = dict(backbone=dict(type='mmkw.KWModule', module=static, cell_num_ratio=2))
