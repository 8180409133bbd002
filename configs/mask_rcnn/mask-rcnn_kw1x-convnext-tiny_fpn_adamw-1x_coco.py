_base_ = './mask-rcnn_convnext-tiny_fpn_adamw-1x_coco.py'

weights_source = _base_.kw1x_source
model = dict(backbone=_base_.kw1x)
