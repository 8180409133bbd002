_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/convnext-tiny.py',
]

model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels),
)
