"""DY-Conv 4x ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=50,
    method='dyconv',
    cell_num_ratio=4,
    # The static ResNet50, which it starts from exactly: no weights of DY-Conv are published.
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/resnet50.pth'),
)
