"""KernelWarehouse 2x ResNet18, to be merged into the ResNet of a config. Channels: 64 to 512."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=18,
    cell_num_ratio=2,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw2x_resnet18.pth'),
)
