"""Static ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.ResNet',
    depth=50,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet50.pth'),
)
