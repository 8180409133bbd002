"""Every convolution of the neck is dynamic and has a warehouse of its own."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(neck=dict(conv_cfg=dict(type='mmkw.KWConv2d', cell_num_ratio=4)))
