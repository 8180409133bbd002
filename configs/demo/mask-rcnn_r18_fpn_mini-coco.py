"""The demo's Mask R-CNN with the static ResNet18, and no temperature to anneal."""

_base_ = './mask-rcnn_kw1x-r18_fpn_mini-coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmkw.ResNet',
        depth=18,
        base_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=False,
    )
)
custom_hooks = [dict(type='mmkw.IterationSeedHook')]
