_base_ = './fpn_convnext-tiny_4xb4-160k_ade20k-512x512.py'

weights_source = _base_.kw1x_source
model = dict(backbone=_base_.kw1x)
