"""KernelWarehouse 1x ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=50,
    cell_num_ratio=1,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1x_resnet50.pth'),
)
