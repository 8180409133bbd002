_base_ = './mask-rcnn_r50_fpn_adamw-1x_coco.py'

model = dict(
    backbone=dict(
        type='mmkw.KWResNet',
        cell_num_ratio=4,
        init_cfg=dict(checkpoint='checkpoints/kw4x_resnet50.pth'),
    )
)
