"""KernelWarehouse 4x MobileNetV2 in place of a detector's backbone. Channels: 24, 32, 96, 1280."""

backbone = dict(
    _delete_=True,
    type='mmkw.KWMobileNetV2',
    pointwise='separate',
    cell_num_ratio=4,
    out_indices=(1, 2, 4, 7),
    # The stem and the first three inverted residual blocks.
    frozen_stages=2,
    norm_eval=True,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw4x_mobilenet_v2.pth'),
)
