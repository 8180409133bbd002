_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# 12 epochs at a batch of 16, steps at 8 and 11.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
