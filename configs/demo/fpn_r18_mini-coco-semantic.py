_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/mini_coco_semantic.py',
    '../_base_/schedules/adamw_mini-coco.py',
    'mmseg::_base_/default_runtime.py',
]

# A Semantic FPN that two cores train from scratch in minutes.
norm_cfg = dict(type='BN')
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True, type='ResNet', depth=18, base_channels=32, norm_cfg=norm_cfg, norm_eval=False
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(
        in_channels=[64] * 4,
        channels=64,
        num_classes=2,
        norm_cfg=norm_cfg,
        # Nine of ten pixels are background.
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce'),
            dict(type='DiceLoss', loss_name='loss_dice'),
        ],
    ),
)

# An epoch of the 1200 images is 150 iterations.
max_iters = 900
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=0.9, by_epoch=False, begin=50, end=max_iters, eta_min=1e-5),
]
custom_hooks = [dict(type='mmkw.IterationSeedHook')]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=150, max_keep_ckpts=2),
)
randomness = dict(seed=0)
