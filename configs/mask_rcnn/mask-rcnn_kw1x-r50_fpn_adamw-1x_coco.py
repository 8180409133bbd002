_base_ = './mask-rcnn_r50_fpn_adamw-1x_coco.py'

model = dict(
    backbone=dict(
        type='mmkw.KWResNet',
        cell_num_ratio=1,
        init_cfg=dict(checkpoint='checkpoints/kw1x_resnet50.pth'),
    )
)
