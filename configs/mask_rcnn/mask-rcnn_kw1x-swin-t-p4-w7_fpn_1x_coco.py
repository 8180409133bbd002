"""Value projections and MLPs are dynamic; starts from the static Swin of the base config."""

_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='SwinTransformer')))
