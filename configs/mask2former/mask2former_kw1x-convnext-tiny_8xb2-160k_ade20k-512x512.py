_base_ = './mask2former_convnext-tiny_8xb2-160k_ade20k-512x512.py'

weights_source = _base_.kw1x_source
model = dict(backbone=_base_.kw1x)
