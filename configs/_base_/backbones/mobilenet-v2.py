"""Static MobileNetV2 in place of a detector's backbone. Channels: 24, 32, 96, 1280."""

backbone = dict(
    _delete_=True,
    type='mmkw.MobileNetV2',
    out_indices=(1, 2, 4, 7),
    # The stem and the first three inverted residual blocks.
    frozen_stages=2,
    norm_eval=True,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/mobilenet_v2.pth'),
)
