_base_ = [
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    '../_base_/backbones/kw1x-convnext-tiny.py',
]

# The neck leaves the first stage out: its norm would never train.
model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.channels[1:], start_level=0),
)
optim_wrapper = _base_.layer_decay
