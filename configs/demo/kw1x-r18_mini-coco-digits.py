_base_ = './r18_mini-coco-digits.py'

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1))
# From one cell a mixture to free mixtures within the first epoch.
custom_hooks = [
    dict(type='mmkw.TemperatureHook', length=1),
    dict(type='mmkw.IterationSeedHook'),
]
