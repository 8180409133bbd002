"""Networks of the libraries, small, of which tests compare the static and the dynamic twin."""

import copy

import torch
from mmcv.cnn.bricks import build_norm_layer
from mmengine import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.utils import is_installed
from torch import nn

# With importorskip the list could not be made where a library is missing.
LIBRARIES = [name for name in ('mmdet', 'mmseg') if is_installed(name)]

_SWIN = dict(embed_dims=24, num_heads=[1, 2, 3, 4], window_size=2)
HRNET = dict(
    stage1=dict(
        num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(16,)
    ),
    **{
        f'stage{n}': dict(
            num_modules=1,
            num_branches=n,
            block='BASIC',
            num_blocks=(1,) * n,
            num_channels=(16, 32, 64, 128)[:n],
        )
        for n in (2, 3, 4)
    },
)
_TRANSFORMER = dict(
    img_size=32, patch_size=8, embed_dims=32, num_layers=4, num_heads=2, out_indices=(1, 3)
)

BACKBONES = {
    'mmdet.ResNet': dict(depth=18, base_channels=8),
    'mmdet.ResNeXt': dict(depth=50, base_channels=16, groups=4, base_width=16),
    'mmdet.RegNet': dict(arch='regnetx_400mf'),
    'mmdet.HRNet': dict(extra=HRNET),
    'mmdet.SwinTransformer': dict(depths=(1, 1, 1, 1), **_SWIN),
    'mmdet.CSPNeXt': dict(widen_factor=0.25, deepen_factor=0.33),
    'mmdet.EfficientNet': dict(arch='b0'),
    'mmdet.MobileNetV2': dict(widen_factor=0.5),
    'mmkw.ConvNeXt': dict(arch=dict(depths=[1, 1, 1, 1], channels=[16, 32, 48, 64])),
    'mmseg.ResNetV1c': dict(depth=18, base_channels=16, stem_channels=16),
    'mmseg.SwinTransformer': dict(depths=[1, 1, 1, 1], **_SWIN),
    'mmseg.MobileNetV2': dict(widen_factor=0.5),
    'mmseg.MobileNetV3': dict(arch='large', out_indices=(0, 1, 12, 16)),
    'mmseg.MixVisionTransformer': dict(embed_dims=16, num_layers=[1] * 4, num_heads=[1] * 4),
    'mmseg.VisionTransformer': dict(**_TRANSFORMER),
    'mmseg.BEiT': dict(**_TRANSFORMER, mlp_ratio=2, qv_bias=True),
    'mmseg.MAE': dict(**_TRANSFORMER, mlp_ratio=2),
    'testConvNeXt': dict(),
}
_LEVELS = dict(in_channels=32, feat_channels=32)
HEADS = {
    'mmdet.Shared2FCBBoxHead': dict(in_channels=32, fc_out_channels=64, roi_feat_size=3),
    'mmdet.RetinaHead': dict(**_LEVELS),
    'mmdet.FCOSHead': dict(**_LEVELS),
    'mmdet.RTMDetSepBNHead': dict(in_channels=32, feat_channels=32, with_objectness=False),
    'mmdet.FCNMaskHead': dict(in_channels=32, conv_out_channels=32),
    'mmseg.FCNHead': dict(in_channels=32, channels=32, in_index=0),
    'mmseg.SegformerHead': dict(in_channels=[16, 32], channels=32, in_index=[0, 1]),
}
BACKBONES = {
    name: cfg for name, cfg in BACKBONES.items() if name[:5] in (*LIBRARIES, 'mmkw.', 'testC')
}
HEADS = {name: cfg for name, cfg in HEADS.items() if name[:5] in LIBRARIES}


def config_of(kind, num_classes=5, **more):
    """The config of a network of the lists."""
    config = dict(type=kind, **copy.deepcopy({**BACKBONES, **HEADS}[kind]), **more)
    if kind in HEADS:
        config['num_classes'] = num_classes
    return config


def thin_backbone(kind):
    """The config of a thin ResNet of one stage."""
    return dict(
        type=kind,
        depth=18,
        base_channels=8,
        stem_channels=8,
        num_stages=1,
        strides=(1,),
        dilations=(1,),
        out_indices=(0,),
    )


def thin_retinanet(backbone):
    """The config of a thin detector of one stage; its heads are small, too."""
    return ConfigDict(
        type='RetinaNet',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=thin_backbone(backbone),
        neck=dict(type='FPN', in_channels=[8], out_channels=8, num_outs=2),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=3,
            in_channels=8,
            stacked_convs=1,
            feat_channels=8,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[1.0],
                strides=[4, 8],
            ),
        ),
        test_cfg=dict(nms_pre=10, min_bbox_size=0, score_thr=0.0, max_per_img=5),
    )


def build(kind, dynamic, num_classes=5, **more):
    """A network of the lists, static or dynamic by its family's rule."""
    config = config_of(kind, num_classes, **more)
    return MODELS.build(dict(type='mmkw.KWModule', module=config) if dynamic else config)


def outputs(kind, network, batch=2, seed=0):
    """What a network gives for random images or maps, as a list of tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    if kind in BACKBONES:
        y = network(draw(3, 32, 32) if 'patch_size' in BACKBONES[kind] else draw(3, 64, 64))
    elif 'BBox' in kind:
        y = network(draw(32, 3, 3))
    elif 'Mask' in kind:
        y = network(draw(32, 7, 7))
    elif kind == 'mmdet.RTMDetSepBNHead':
        y = network([draw(32, side, side) for side in (8, 4, 2)])
    elif kind.startswith('mmdet'):
        y = network([draw(32, side, side) for side in (8, 4, 2, 2, 2)])
    elif kind == 'mmseg.SegformerHead':
        y = network([draw(16, 8, 8), draw(32, 4, 4)])
    else:
        y = network([draw(32, 8, 8)])
    return list(_flat(y))


def _flat(y):
    if isinstance(y, torch.Tensor):
        yield y
    else:
        for part in y:
            yield from _flat(part)


class _Block(BaseModule):
    """With the names and the linear layers of mmpretrain's ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
        y = self.pointwise_conv2(self.act(self.pointwise_conv1(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


@MODELS.register_module(name='testConvNeXt')
class ConvNeXt(BaseModule):
    """Stands for mmpretrain's, which is of this class name."""

    def __init__(self, depths=(1, 1, 3, 1), channels=(16, 32, 48, 64), init_cfg=None):
        if init_cfg is None:
            init_cfg = [
                dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0),
                dict(type='Constant', layer=['LayerNorm'], val=1.0, bias=0.0),
            ]
        super().__init__(init_cfg)
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        before = 3
        for index, (depth, width) in enumerate(zip(depths, channels)):
            size = 2 if index else 4
            parts = [nn.Conv2d(before, width, size, size), _norm(width if not index else before)]
            self.downsample_layers.append(nn.Sequential(*(parts[::-1] if index else parts)))
            self.stages.append(nn.Sequential(*(_Block(width) for _ in range(depth))))
            before = width
        self.norm3 = _norm(before)

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return (self.norm3(x),)


def _norm(channels):
    return build_norm_layer(dict(type='GN', num_groups=1), channels)[1]
