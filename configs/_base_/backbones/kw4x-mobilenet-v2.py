"""KernelWarehouse 4x MobileNetV2."""

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 4x MobileNetV2, ImageNet top-1 75.92, github.com/OSVAI/KernelWarehouse'
)
weights = dict(type='Pretrained', checkpoint='checkpoints/kw4x_mobilenet_v2.pth')
# To be merged into the static MobileNetV2 of a config.
warehouses = dict(
    type='mmkw.KWMobileNetV2', pointwise='separate', cell_num_ratio=4, init_cfg=weights
)
# In place of a detector's backbone, and its channels.
backbone = dict(
    warehouses, _delete_=True, out_indices=(1, 2, 4, 7), frozen_stages=1, norm_eval=True
)
channels = [24, 32, 96, 1280]
