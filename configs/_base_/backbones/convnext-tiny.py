"""ConvNeXt-Tiny in place of a config's backbone, and its optimizer; static, or made 1x by kw1x."""

# Weights to download, and the name to save them under.
weights_source = 'static ConvNeXt-Tiny, ImageNet top-1 82.07, github.com/OSVAI/KernelWarehouse'
weights = dict(type='Pretrained', checkpoint='checkpoints/convnext_tiny.pth')
backbone = dict(
    _delete_=True,
    type='mmkw.ConvNeXt',
    arch='tiny',
    drop_path_rate=0.4,
    layer_scale_init_value=1.0,
    init_cfg=weights,
)
channels = [96, 192, 384, 768]
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

# To be merged into the static backbone: KernelWarehouse 1x. Weights to download, and the name to save
# them under.
kw1x_source = (
    'KernelWarehouse 1x ConvNeXt-Tiny, ImageNet top-1 82.51, github.com/OSVAI/KernelWarehouse'
)
kw1x = dict(
    type='mmkw.KWConvNeXt',
    cell_num_ratio=1,
    init_cfg=dict(checkpoint='checkpoints/kw1x_convnext_tiny.pth'),
)
