_base_ = ['./pspnet_r50b-d8_4xb4-40k_coco-stuff10k-512x512.py', '../_base_/backbones/kw1x-r50.py']

model = dict(pretrained=None, backbone=_base_.backbone)
