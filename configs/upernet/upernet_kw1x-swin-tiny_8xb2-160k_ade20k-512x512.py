"""Value projections and MLPs are dynamic; starts from the static Swin of the base config."""

_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(type='mmkw.KWBackbone', backbone=dict(type='SwinTransformer')))
