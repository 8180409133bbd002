"""Starts from the static HRNet that the base config names."""

_base_ = 'mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='HRNet')))
