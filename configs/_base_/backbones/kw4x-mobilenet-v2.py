"""KernelWarehouse 4x MobileNetV2, for a detector in place of the static one of mobilenet-v2.py."""

_base_ = './mobilenet-v2.py'

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 4x MobileNetV2, ImageNet top-1 75.92, github.com/OSVAI/KernelWarehouse'
)
weights = dict(checkpoint='checkpoints/kw4x_mobilenet_v2.pth')
backbone = dict(type='mmkw.KWMobileNetV2', pointwise='separate', cell_num_ratio=4, init_cfg=weights)
# To be merged into the static MobileNetV2 of a segmentor.
warehouses = dict(backbone, init_cfg=dict(weights, type='Pretrained'))
