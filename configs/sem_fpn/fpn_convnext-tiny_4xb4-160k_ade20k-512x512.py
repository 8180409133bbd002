_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    '../_base_/backbones/convnext-tiny.py',
]

model = dict(pretrained=None, backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
optim_wrapper = _base_.layer_decay
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=160000, eta_min=0.0, by_epoch=False),
]
