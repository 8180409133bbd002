"""Static ResNet50, to be merged into that of a config."""

# Weights to download, and the name to save them under.
weights_source = 'static ResNet50, ImageNet top-1 78.44, github.com/OSVAI/KernelWarehouse'
weights = dict(type='Pretrained', checkpoint='checkpoints/resnet50.pth')
backbone = dict(type='mmkw.ResNet', depth=50, init_cfg=weights)
