_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# 12 epochs at a batch of 16, steps at 8 and 11.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # By name, as in the paper's release: the norms of the attentions (norm1) are not decayed, those
    # of the backbone (bn1, downsample.1) are.
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
