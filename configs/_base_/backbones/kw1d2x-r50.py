"""KernelWarehouse 1/2x ResNet50, to be merged into the ResNet50 of a config."""

backbone = dict(
    type='mmkw.KWResNet',
    depth=50,
    cell_num_ratio=1 / 2,
    cell_inplane_ratio=1 / 2,
    cell_outplane_ratio=1 / 2,
    nonlocal_basis_ratio=1 / 16,
    # To be downloaded: docs/model_zoo.md says where from.
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/kw1d2x_resnet50.pth'),
)
