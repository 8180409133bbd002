_base_ = ['../_base_/recipes/adamw-300e_in1k.py', '../_base_/backbones/kw1x-convnext-tiny.py']

model = dict(
    backbone=dict(
        _base_.backbone,
        out_indices=(3,),
        gap_before_final_norm=True,
        drop_path_rate=0.1,
        layer_scale_init_value=1e-6,
        init_cfg=None,
    )
)
custom_hooks = [dict(type='mmkw.TemperatureHook', length=20)]
