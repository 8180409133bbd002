"""KernelWarehouse 1x MobileNetV2 in place of a config's backbone."""

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 1x MobileNetV2, ImageNet top-1 74.68, github.com/OSVAI/KernelWarehouse'
)
weights = dict(type='Pretrained', checkpoint='checkpoints/kw1x_mobilenet_v2.pth')
backbone = dict(
    _delete_=True,
    type='mmkw.KWMobileNetV2',
    pointwise='joint',
    cell_num_ratio=1,
    out_indices=(1, 2, 4, 7),
    frozen_stages=1,
    norm_eval=True,
    init_cfg=weights,
)
channels = [24, 32, 96, 1280]
