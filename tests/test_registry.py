"""Types resolve from either library's configs, also where nothing has imported mmkw."""

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import exhaustively
from mmengine.registry import init_default_scope
from twin_networks import HRNET


def run(code, *missing):
    """Runs code in an interpreter where some packages cannot be imported."""
    block = f'import sys\nfor name in {missing!r}: sys.modules[name] = None\n'
    return subprocess.run(
        [sys.executable, '-c', block + textwrap.dedent(code)], capture_output=True, text=True
    )


def check(code, *missing):
    result = run(code, *missing)
    assert result.returncode == 0, result.stderr
    return result.stdout


BUILD = """
    import sys
    from mmengine.registry import init_default_scope, HOOKS
    from {scope}.registry import MODELS
    init_default_scope('{scope}')
    assert 'mmkw.registry' not in sys.modules
    network = MODELS.build(dict(type='mmkw.KWResNet', depth=18, base_channels=8))
    print(type(network).__module__)
    hook = HOOKS.build(dict(type='mmkw.TemperatureHook', length=1))
    from mmcv.cnn import ConvModule
    conv = ConvModule(8, 8, 3, conv_cfg=dict(type='mmkw.KWConv2d', cell_num_ratio=2))
    print(type(conv.conv).__name__, type(hook).__name__)
"""


@pytest.mark.parametrize(
    'scope, missing', exhaustively([('mmdet', 'mmseg'), ('mmseg', 'mmdet')], [('mmdet', 'mmseg')])
)
def test_types_resolve_in_configs_of_both_libraries(scope, missing):
    if importlib.util.find_spec(scope) is None:
        pytest.skip(f'{scope} is not installed')
    output = check(BUILD.format(scope=scope), missing)
    # OneDL's libraries print what they do without.
    lines = [line for line in output.splitlines() if not line.startswith('Could not import')]
    assert lines == [f'{scope}.models.backbones.resnet', 'KWConv2d TemperatureHook']


def test_convolutions_of_an_fpn_and_a_head_become_dynamic():
    registry = pytest.importorskip('mmdet.registry', reason='the neck and the head are its')
    init_default_scope('mmdet')
    build = registry.MODELS.build
    conv_cfg = dict(type='mmkw.KWConv2d', cell_num_ratio=4)
    fpn = build(
        dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=3, conv_cfg=conv_cfg)
    )
    fpn.init_weights()
    outs = fpn([torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)])
    assert [tuple(o.shape) for o in outs] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]
    assert type(fpn.fpn_convs[0].conv).__name__ == 'KWConv2d'
    hrnet = build(dict(type='HRNet', extra=HRNET, conv_cfg=conv_cfg))
    hrnet.init_weights()
    assert len(hrnet(torch.randn(2, 3, 64, 64))) == 4
    head = build(
        dict(
            type='FCNMaskHead',
            num_convs=2,
            in_channels=8,
            conv_out_channels=8,
            num_classes=3,
            conv_cfg=conv_cfg,
        )
    )
    assert head(torch.randn(5, 8, 14, 14)).shape == (5, 3, 28, 28)
    assert head(torch.randn(0, 8, 14, 14)).shape == (0, 3, 28, 28)


def test_without_either_library_the_error_names_the_extras():
    libraries = ('mmdet', 'mmseg', 'mmpretrain')
    result = run('from mmkw.backbones import KWResNet; KWResNet(depth=18)', *libraries)
    assert "pip install 'mmkw[det]', 'mmkw[seg]' or 'mmkw[cls]'" in result.stderr


def test_an_unsupported_version_reaches_the_user_of_a_config():
    result = run("""
        from importlib import metadata
        real = metadata.version
        metadata.version = lambda name: '2.28.0' if name == 'mmdet' else real(name)
        from mmengine.registry import MODELS
        MODELS.build(dict(type='mmkw.KWConv2d', in_channels=1, out_channels=1, kernel_size=1))
    """)
    assert 'UnsupportedVersionError: mmkw needs mmdet>=3.0.0,<3.4' in result.stderr
    assert 'but mmdet 2.28.0 is installed' in result.stderr
