_base_ = '../_base_/recipes/mask-rcnn_fpn_adamw-1x_coco.py'

# Weights to download, and the name to save them under.
weights_source = (
    'KernelWarehouse 1/2x ResNet50, ImageNet top-1 79.30, github.com/OSVAI/KernelWarehouse'
)
model = dict(
    backbone=dict(
        type='mmkw.KWResNet',
        cell_num_ratio=1 / 2,
        cell_inplane_ratio=1 / 2,
        cell_outplane_ratio=1 / 2,
        nonlocal_basis_ratio=1 / 16,
        drop_path_rate=[0.1] * 16,
        init_cfg=dict(checkpoint='checkpoints/kw1d2x_resnet50.pth'),
    )
)
