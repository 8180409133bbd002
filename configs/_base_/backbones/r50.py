"""Static ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.ResNet',
    depth=50,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet50.pth'),
)
