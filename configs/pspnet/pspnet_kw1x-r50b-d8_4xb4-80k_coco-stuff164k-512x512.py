_base_ = [
    'mmseg::pspnet/pspnet_r50-d8_4xb4-80k_coco-stuff164k-512x512.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(pretrained=None, backbone=_base_.backbone)
