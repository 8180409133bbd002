"""The optimizer of ConvNeXt, to be put in the place of a config's ``optim_wrapper``."""

layer_decay = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='mmkw.LayerDecayConstructor',
    paramwise_cfg=dict(
        num_layers=6,
        decay_rate=0.95,
        # Biases and norms, those of neck and heads too; gamma has four dimensions and is decayed.
        flat_decay_mult=0.0,
        # Cells learn at the full rate, whichever layers they serve.
        custom_keys=dict(warehouse_manager=dict(lr_mult=1.0)),
    ),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
