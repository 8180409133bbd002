"""Static MobileNetV2 in place of a detector's backbone."""

# Weights to download, and the name to save them under.
weights_source = 'static MobileNetV2, ImageNet top-1 72.04, github.com/OSVAI/KernelWarehouse'
weights = dict(type='Pretrained', checkpoint='checkpoints/mobilenet_v2.pth')
backbone = dict(
    _delete_=True,
    type='mmkw.MobileNetV2',
    out_indices=(1, 2, 4, 7),
    # The stem and the first three inverted residual blocks.
    frozen_stages=2,
    norm_eval=True,
    init_cfg=weights,
)
channels = [24, 32, 96, 1280]
