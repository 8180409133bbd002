"""KernelWarehouse 4x ResNet50, to be merged into the static ResNet50 of a config."""

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 4x ResNet50, ImageNet top-1 81.05, github.com/OSVAI/KernelWarehouse'
)
weights = dict(type='Pretrained', checkpoint='checkpoints/kw4x_resnet50.pth')
backbone = dict(type='mmkw.KWResNet', depth=50, cell_num_ratio=4, init_cfg=weights)
