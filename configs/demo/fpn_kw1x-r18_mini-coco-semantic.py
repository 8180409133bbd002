_base_ = './fpn_r18_mini-coco-semantic.py'

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1))
# From one cell a mixture to free mixtures within the first epoch.
custom_hooks = [
    dict(type='mmkw.TemperatureHook', length=150, by_epoch=False),
    dict(type='mmkw.IterationSeedHook'),
]
