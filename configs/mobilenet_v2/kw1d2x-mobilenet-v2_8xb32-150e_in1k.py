_base_ = ['../_base_/recipes/sgd-150e_in1k.py', '../_base_/backbones/kw1d2x-mobilenet-v2.py']

model = dict(
    backbone=dict(
        _base_.backbone,
        out_indices=(7,),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    # The classifier is dynamic, too, with a warehouse of its own.
    head=dict(
        type='mmkw.KWModule',
        module=dict(type='LinearClsHead', init_cfg=None),
        patterns=[dict(match='fc', warehouse='classifier')],
        cell_num_ratio=1 / 2,
        cell_inplane_ratio=1 / 40,
        reduction=1 / 32,
        attention_norm_cfg=dict(type='BN1d'),
    ),
)
custom_hooks = [dict(type='mmkw.TemperatureHook', length=15)]
