_base_ = [
    'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py',
    '../_base_/backbones/kw4x-r50.py',
]

model = dict(
    backbone=dict(
        _base_.backbone, _delete_=True, out_indices=(1, 2, 3), frozen_stages=1, norm_eval=True
    ),
    neck=dict(in_channels=[512, 1024, 2048]),
)
