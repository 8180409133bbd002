"""The library of a config is known where its types are classes, as in new-style configs."""

import argparse
import importlib

import pytest
import torch
from mmengine.config import Config
from torch import nn

import mmkw
from mmkw.engine.building import build_model, load_trained, read_config, type_name
from mmkw.engine.command_line import check_weights, library_of, load_config

MODELS = {
    'mmdet': """
from mmdet.models import RetinaNet as Model, FPN, RetinaHead
from mmdet.models.data_preprocessors import DetDataPreprocessor as Preprocessor
anchors = dict(type='AnchorGenerator', ratios=[1.0], scales=[4], strides=[8, 16, 32, 64, 128])
boxes = dict(type='DeltaXYWHBBoxCoder')
head = dict(
    type=RetinaHead, num_classes=3, in_channels=8, anchor_generator=anchors, bbox_coder=boxes
)
parts = dict(
    neck=dict(type=FPN, in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5), bbox_head=head
)
""",
    'mmseg': """
from mmseg.models import EncoderDecoder as Model, FCNHead, SegDataPreProcessor as Preprocessor
parts = dict(decode_head=dict(type=FCNHead, in_channels=64, channels=8, num_classes=3))
""",
    'mmpretrain': """
from mmpretrain.models import ImageClassifier as Model, LinearClsHead, GlobalAveragePooling
from mmpretrain.models import ClsDataPreprocessor as Preprocessor
head = dict(type=LinearClsHead, num_classes=3, in_channels=64)
parts = dict(neck=dict(type=GlobalAveragePooling), head=head)
""",
}
BACKBONE = """
from mmengine.model import PretrainedInit
from mmkw.backbones import {name} as Backbone
default_scope = None
backbone = dict(
    type=Backbone,
    depth=18,
    base_channels=8,
    init_cfg=dict(type=PretrainedInit, checkpoint='nowhere.pth'),
)
model = dict(type=Model, data_preprocessor=dict(type=Preprocessor), backbone=backbone, **parts)
"""


@pytest.mark.parametrize('name', ['ResNet', 'KWResNet'])
@pytest.mark.parametrize('library', MODELS)
def test_a_config_of_classes_has_the_backbone_of_its_library(library, name, tmp_path, capsys):
    pytest.importorskip(library)
    path = tmp_path / 'config.py'
    path.write_text(MODELS[library] + BACKBONE.format(name=name))
    config = read_config(str(path))
    assert library_of(config) == library
    expected = importlib.import_module(f'{library}.models').ResNet
    assert type(build_model(config).backbone) in (expected, *expected.__subclasses__())
    arguments = dict(local_rank=0, cfg_options={}, launcher='none', work_dir=None)
    parser = argparse.ArgumentParser()
    loaded = load_config(parser, argparse.Namespace(config=str(path), **arguments))
    assert loaded.default_scope == library
    with pytest.raises(SystemExit):
        check_weights(parser, loaded)
    assert 'model.backbone.init_cfg.checkpoint: nowhere.pth does not' in capsys.readouterr().err


def test_the_library_of_types_with_scopes():
    for scope, kind, expected in (
        (None, 'mmseg.EncoderDecoder', 'mmseg'),
        ('mmpretrain', 'ImageClassifier', 'mmpretrain'),
        (None, 'MaskRCNN', 'mmdet'),
    ):
        config = Config(dict(model=dict(type=kind), default_scope=scope))
        assert library_of(config) == expected
        assert type_name(config.model) == kind.rpartition('.')[2]


@pytest.mark.parametrize('kind', [mmkw.KWConv2d, nn.Conv2d])
def test_a_file_without_what_is_beside_its_weights_loads(kind, tmp_path):
    source, target = kind(4, 6, 3), kind(4, 6, 3)
    torch.save(dict(state_dict=source.state_dict(), meta=None), tmp_path / 'a.pth')
    load_trained(target, str(tmp_path / 'a.pth'))
    assert all(map(torch.equal, target.state_dict().values(), source.state_dict().values()))
