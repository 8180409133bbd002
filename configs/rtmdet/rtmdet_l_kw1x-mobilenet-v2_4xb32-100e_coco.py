_base_ = [
    'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py',
    '../_base_/backbones/kw1x-mobilenet-v2.py',
]

model = dict(
    backbone=dict(_base_.backbone, out_indices=(2, 4, 7)),
    # The neck's hidden layers have as few as 16 channels.
    neck=dict(in_channels=_base_.channels[1:], norm_cfg=dict(type='GN', num_groups=16)),
)
