_base_ = [
    './fcn_mobilenet-v2-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/backbones/kw1x-mobilenet-v2.py',
]

model = dict(pretrained=None, backbone=_base_.warehouses)
