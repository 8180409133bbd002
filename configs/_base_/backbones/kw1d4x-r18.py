"""KernelWarehouse 1/4x ResNet18, to be merged into the ResNet of a config. Channels: 64 to 512."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=18,
    cell_num_ratio=1 / 4,
    cell_inplane_ratio=1 / 2,
    cell_outplane_ratio=1 / 2,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1d4x_resnet18.pth'),
)
