_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/mini_coco_instance.py',
    '../_base_/schedules/adamw_mini-coco.py',
    'mmdet::_base_/default_runtime.py',
]

# A Mask R-CNN that two cores train from scratch in minutes: three thin stages, norms everywhere.
channels = 64
norm_cfg = dict(type='BN')
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
    ),
    neck=dict(in_channels=[32, 64, 128], out_channels=channels, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=[4, 8, 16], finest_scale=28),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=channels,
            fc_out_channels=256,
            num_classes=10,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=[4, 8, 16], finest_scale=28),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=10,
            norm_cfg=norm_cfg,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

max_epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        convert_to_iter_based=True,
    ),
]

custom_hooks = [dict(type='mmkw.IterationSeedHook')]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
