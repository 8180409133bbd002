"""KernelWarehouse 4x ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=50,
    cell_num_ratio=4,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw4x_resnet50.pth'),
)
