"""Static ResNet18, to be merged into the ResNet of a config. Channels: 64, 128, 256, 512."""

backbone = dict(
    type='mmkw.ResNet',
    depth=18,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet18.pth'),
)
