_base_ = ['../_base_/recipes/sgd-150e_in1k.py', '../_base_/backbones/kw4x-mobilenet-v2.py']

model = dict(
    backbone=dict(
        _base_.backbone,
        out_indices=(7,),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
)
custom_hooks = [dict(type='mmkw.TemperatureHook', length=15)]
