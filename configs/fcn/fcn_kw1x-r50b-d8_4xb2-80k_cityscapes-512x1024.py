_base_ = [
    'mmseg::fcn/fcn_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(pretrained=None, backbone=_base_.backbone)
