_base_ = './mask-rcnn_r50_fpn_adamw-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmkw.ConvNeXt',
        arch='tiny',
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        init_cfg=dict(
            type='Pretrained',
            prefix='backbone.',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/convnext/downstream/'
            'convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth',
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# Layer-wise learning rates, steps at 9 and 11.
optim_wrapper = dict(
    constructor='mmkw.LayerDecayConstructor',
    paramwise_cfg=dict(num_layers=6, decay_rate=0.95),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]
