_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(pretrained=None, backbone=_base_.backbone)
