_base_ = './mask-rcnn_mobilenet-v2_fpn_adamw-1x_coco.py'

model = dict(
    backbone=dict(
        type='mmkw.KWMobileNetV2',
        pointwise='joint',
        cell_num_ratio=1,
        init_cfg=dict(checkpoint='checkpoints/kw1x_mobilenet_v2.pth'),
    )
)
