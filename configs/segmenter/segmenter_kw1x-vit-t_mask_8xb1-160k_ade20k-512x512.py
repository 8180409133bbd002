"""Value projections and MLPs are dynamic; starts from the static ViT of the base config."""

_base_ = 'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py'

model = dict(backbone=dict(type='mmkw.KWModule', module=dict(type='VisionTransformer')))
