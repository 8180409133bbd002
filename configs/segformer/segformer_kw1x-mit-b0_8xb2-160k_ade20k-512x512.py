"""Value projections and MLPs are dynamic; starts from the static MiT of the base config."""

_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='MixVisionTransformer')))
