"""Static ConvNeXt-Tiny in place of a config's backbone. Channels: 96, 192, 384, 768."""

backbone = dict(
    _delete_=True,
    type='mmkw.ConvNeXt',
    arch='tiny',
    drop_path_rate=0.4,
    layer_scale_init_value=1.0,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/convnext_tiny.pth'),
)
