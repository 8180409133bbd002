"""KernelWarehouse 4x ResNet18, to be merged into the ResNet of a config. Channels: 64 to 512."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=18,
    cell_num_ratio=4,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw4x_resnet18.pth'),
)
