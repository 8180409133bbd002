_base_ = './mask-rcnn_convnext-tiny_fpn_adamw-1x_coco.py'

model = dict(
    backbone=dict(
        type='mmkw.KWConvNeXt',
        cell_num_ratio=1,
        init_cfg=dict(checkpoint='checkpoints/kw1x_convnext_tiny.pth'),
    )
)
