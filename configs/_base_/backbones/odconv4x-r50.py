"""ODConv 4x ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=50,
    method='odconv',
    cell_num_ratio=4,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/odconv4x_resnet50.pth'),
)
