"""Merged into MMSegmentation's MobileNetV2, which lacks the last convolution of the weights."""

_base_ = 'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024.py'

# To be downloaded: docs/model_zoo.md says where from.
weights = dict(type='Pretrained', checkpoint='checkpoints/kw1x_mobilenet_v2.pth')
backbone = dict(type='mmkw.KWMobileNetV2', pointwise='joint', cell_num_ratio=1, init_cfg=weights)
model = dict(pretrained=None, backbone=backbone)
