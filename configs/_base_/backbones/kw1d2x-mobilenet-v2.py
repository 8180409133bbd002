"""KernelWarehouse 1/2x MobileNetV2 in place of a detector's backbone. Channels: 24, 32, 96, 1280."""

# Of the nine warehouses: the stem's and those of the depthwise convolutions keep the static size,
# the two of the pointwise convolutions of the last stage are halved.
ratio = [1, 1, 1, 1, 1, 1, 1 / 2, 1, 1 / 2]
backbone = dict(
    _delete_=True,
    type='mmkw.KWMobileNetV2',
    pointwise='last_stage',
    cell_num_ratio=ratio,
    cell_inplane_ratio=ratio,
    cell_outplane_ratio=ratio,
    reduction=1 / 32,
    out_indices=(1, 2, 4, 7),
    # The stem and the first three inverted residual blocks.
    frozen_stages=2,
    norm_eval=True,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1d2x_mobilenet_v2.pth'),
)
del ratio
