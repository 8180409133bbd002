_base_ = [
    'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py',
    '../_base_/backbones/kw1x-convnext-tiny.py',
]

model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.channels[1:]),
)
