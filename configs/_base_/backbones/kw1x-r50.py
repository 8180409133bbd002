"""KernelWarehouse 1x ResNet50, to be merged into the static ResNet50 of a config."""

# ImageNet weights of the paper's authors (top-1 80.38): download, save under this name.
weights = dict(type='Pretrained', checkpoint='checkpoints/kw1x_resnet50.pth')
backbone = dict(type='mmkw.KWResNet', depth=50, cell_num_ratio=1, init_cfg=weights)
