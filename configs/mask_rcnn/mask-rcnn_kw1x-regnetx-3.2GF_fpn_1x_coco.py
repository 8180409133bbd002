"""Starts from the static RegNet that the base config names."""

_base_ = 'mmdet::regnet/mask-rcnn_regnetx-3.2GF_fpn_1x_coco.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='RegNet')))
