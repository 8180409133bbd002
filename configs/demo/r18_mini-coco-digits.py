_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    '../_base_/datasets/mini_coco_digits.py',
    '../_base_/schedules/adamw_mini-coco.py',
    'mmpretrain::_base_/default_runtime.py',
]

# A ResNet18 that two cores train from scratch in minutes.
model = dict(
    backbone=dict(stem_channels=16, base_channels=16), head=dict(num_classes=10, in_channels=128)
)

max_epochs = 6
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=max_epochs, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type='mmkw.IterationSeedHook')]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
