_base_ = ['../_base_/recipes/adamw-300e_in1k.py', '../_base_/backbones/kw1d2x-r50.py']

model = dict(
    backbone=dict(_base_.backbone, _delete_=True, init_cfg=None),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=2048),
)
custom_hooks = [dict(type='mmkw.TemperatureHook', length=20)]
