"""Starts from the static CSPNeXt that the base config names."""

_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='CSPNeXt')))
