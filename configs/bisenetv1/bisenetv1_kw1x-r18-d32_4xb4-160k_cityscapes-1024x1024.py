"""Trained from scratch, as the base config is."""

_base_ = 'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='BiSeNetV1')))
