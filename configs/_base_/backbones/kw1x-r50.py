"""KernelWarehouse 1x ResNet50, to be merged into the static ResNet50 of a config."""

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 1x ResNet50, ImageNet top-1 80.38, github.com/OSVAI/KernelWarehouse'
)
weights = dict(type='Pretrained', checkpoint='checkpoints/kw1x_resnet50.pth')
backbone = dict(type='mmkw.KWResNet', depth=50, cell_num_ratio=1, init_cfg=weights)
