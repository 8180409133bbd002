"""Trained from scratch, as the base config is."""

_base_ = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'

static = dict(type='CSPDarknet')
model = dict(backbone=dict(type='mmkw.KWModule', module=static, cell_num_ratio=2))
