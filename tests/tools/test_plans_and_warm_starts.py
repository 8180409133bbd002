"""``mmkw plan`` and ``mmkw convert``, as a user runs them."""

import re
import sys
from contextlib import nullcontext

import command_util
import pytest
import torch
from configs_util import build_model
from mmengine.config import Config

from mmkw import cli
from mmkw.cli import plan
from mmkw.engine import building
from mmkw.sharing import static_networks

pytest.importorskip('mmdet', reason='the configs are for it')
DEMO = 'configs/demo/mask-rcnn_kw1x-r18-half_fpn_warm-start_mini-conditions.py'
PATTERNS = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
static = dict(type='ResNet', depth=18, base_channels=8, norm_cfg=dict(type='BN'))
patterns = [
    dict(match=r'layer1\\.\\d+\\.conv\\d', warehouse='a'),
    dict(match=r'layer4\\.\\d+\\.conv\\d', warehouse='b'),
]
model = dict(
    backbone=dict(_delete_=True, type='mmkw.KWModule', module=static, patterns=patterns),
    neck=dict(in_channels=[8, 16, 32, 64]),
)
"""


def run(root, *arguments):
    """The command in a process of its own."""
    result, output = command_util.run(root, sys.executable, '-m', 'mmkw', *arguments)
    assert result.returncode == 0, output
    return result.stdout


@pytest.fixture
def run_here(root, monkeypatch, capsys):
    """The command in this process, which spares it the imports; what it prints."""

    def run_command(*arguments, fails=False):
        arguments = list(map(str, arguments))
        if fails:
            with pytest.raises(SystemExit) as error:
                cli.main(arguments)
            assert error.value.code not in (0, None)
            return capsys.readouterr().err
        cli.main(arguments)
        return capsys.readouterr().out

    monkeypatch.chdir(root)
    return run_command


def test_the_plan_of_the_paper_s_resnet50(root):
    config = 'configs/mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py'
    out = run(root, 'plan', config, '--budget-params', '60M')
    assert (
        '| stage4 | 8 | 1 | 512x512x1x1 | 47 | 47 | 12,320,768 | 734,800 | out 512; in 512 |' in out
    )
    assert 'layer4.0.conv2 (512, 512, 3x3), layer4.0.conv3 (2048, 512, 1x1)' in out
    assert '| parameters of the parts above | 23,508,032 | 26,003,310 | 1.106 |' in out
    assert 'Of these 23,425,024 are cells and 2,495,278 attentions.' in out
    # What it says comes out when the config is built so.
    head, budgets = out.split('For 60,000,000 parameters, ')[1].split(
        ' with\nbackbone: cell_num_ratio='
    )
    cfg = Config.fromfile(root / config)
    cfg.model.backbone.cell_num_ratio = eval(budgets.splitlines()[0])
    backbone = building.build_model(cfg, on_meta=True).backbone
    total = sum(p.numel() for p in backbone.parameters())
    assert f'{total:,}' == head
    assert 55e6 < total <= 60e6


@pytest.mark.parametrize(
    'config, options, message',
    [
        ('nowhere.py', [], 'config nowhere.py: '),
        ('mmkw::mask_rcnn/kw1x-r50.py', [], 'mmkw has no config .mask_rcnn/kw1x-r50.py., but '),
        ('nobody::a/b.py', [], 'config nobody::a/b.py: '),
        ('configs/_base_/backbones/kw1x-r50.py', [], 'has no model'),
        ('configs/demo/mask-rcnn_r18_fpn_mini-coco.py', [], 'builds no network with warehouses'),
        (DEMO, ['--budget-params', '1K'], r'--budget-params 1,000: the least is'),
        (DEMO, ['--budget-params', 'few'], "'few' is no number of parameters such as 30M"),
        (DEMO, ['--budget-params', 'inf'], "'inf' is no number of parameters such as 30M"),
        (DEMO, ['--cfg-options', 'model.backbone.start_tau=2'], f'config {DEMO}: .*start_tau must'),
        (DEMO, ['--cfg-options', 'model.backbone.depth=19'], f'config {DEMO}: .*19'),
        (
            DEMO,
            ['--cfg-options', 'model.backbone.cell_num_ration=2'],
            f'config {DEMO}: .*ration.*own options here are .*cell_num_ratio, ',
        ),
        (
            DEMO,
            ['--cfg-options', 'model.backbone.type=KWResNet'],
            "model.backbone.type is 'KWResNet', a type of mmkw: write 'mmkw.KWResNet'",
        ),
        (DEMO, ['--cfg-options', 'custom_hooks.9.length=2'], '--cfg-options .*custom_hooks.9'),
        (DEMO, ['--shape', '-1', '64'], 'expected 2 arguments|no number of pixels'),
        (DEMO, ['--shape', '2', '2'], '--shape 2 2: ResNet got an image of 2 x 2 pixels'),
        (DEMO, ['--shape', '0', '64'], "'0' is no number of pixels such as 224"),
        (
            DEMO,
            ['--cfg-options', 'model.backbone.cell_num_ratio=1.5'],
            f'config {DEMO}: .*cell_num_ratio.*1.5',
        ),
    ],
)
def test_mistakes_in_plans_are_named(run_here, config, options, message):
    assert re.search(message, run_here('plan', config, *options, fails=True))


FAULTY = {
    'name': ('model = dict(depth=dep)', "NameError: name 'dep' is not defined"),
    'base': (
        'from mmengine.config import read_base\n\nwith read_base():\n    from .nothing import *\n',
        r'config .*\.py: .*nothing',
    ),
    'division': ('model = dict(depth=1 / 0)', 'ZeroDivisionError: division by zero'),
    'number': ('model = 3', 'has the model 3, which is no dict'),
}


@pytest.mark.parametrize('kind', FAULTY)
def test_faults_in_a_config_are_named(run_here, tmp_path, kind):
    content, message = FAULTY[kind]
    (tmp_path / 'a.py').write_text(content)
    assert re.search(message, run_here('plan', tmp_path / 'a.py', fails=True))


def test_a_config_after_the_overrides_is_named(run_here):
    for options in (['a=1', DEMO], ['a=[1,2']):
        out = run_here('plan', '--cfg-options', *options, fails=True)
        assert f'--cfg-options {options[-1]}: not a key=value' in out


def test_the_least_of_a_method_without_cells_says_no_word_of_them(run_here, tmp_path):
    config = tmp_path / 'a.py'
    config.write_text(PATTERNS.replace('patterns=patterns', "method='dyconv', cell_num_ratio=4"))
    out = run_here('plan', config, '--budget-params', '1K', fails=True)
    assert 'the least is' in out and 'fewer dynamic layers' in out and 'cell_' not in out


def test_budgets_of_patterns_are_told_by_warehouse(run_here, tmp_path):
    config = tmp_path / 'a.py'
    config.write_text(PATTERNS)
    out = run_here('plan', config, '--budget-params', '300K')
    (line,) = (line for line in out.splitlines() if line.startswith('With patterns, each in its'))
    budgets = dict(part.split() for part in line.partition('own: ')[2].split(', '))
    assert all(float(budget) in plan.BUDGETS for budget in budgets.values())
    assert set(budgets) == {'a', 'b'} and len(set(budgets.values())) == 2
    options = [
        f'model.backbone.patterns.{i}.cell_num_ratio={v}' for i, v in enumerate(budgets.values())
    ]
    again = run_here('plan', config, '--cfg-options', *options)
    total = out.split('For 300,000 parameters, ')[1].split()[0]
    assert f' {total} | ' in next(line for line in again.splitlines() if 'parts above' in line)


def test_a_model_around_a_detector_has_a_plan(run_here, tmp_path):
    config = tmp_path / 'a.py'
    config.write_text(
        "_base_ = 'mmdet::soft_teacher/"
        "soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'\n"
        "model = dict(detector=dict(backbone=dict(type='mmkw.KWResNet')))\n"
    )
    out = run_here('plan', config)
    assert 'student.backbone (ResNet)' in out and '| parameters of the model |' in out


@pytest.fixture(scope='module')
def static(root, tmp_path_factory):
    torch.manual_seed(0)
    with static_networks():
        model = build_model(Config.fromfile(root / DEMO))
    path = tmp_path_factory.mktemp('static') / 'static.pth'
    torch.save(
        dict(meta=dict(dataset_meta=dict(classes=('a',))), state_dict=model.state_dict()), path
    )
    return path


def test_a_whole_model_is_converted_and_compared(root, static, tmp_path):
    target = tmp_path / 'kw.pth'
    options = ['--shape', 64, 64, '--cfg-options', 'model.backbone.cell_num_ratio=4']
    out = run(root, 'convert', static, target, '--config', DEMO, *options)
    (line,) = [line for line in out.splitlines() if 'largest difference' in line]
    assert 0 <= float(line.split()[-1]) < 1e-4
    assert line.startswith('backbone: ')
    stored = torch.load(target, weights_only=True)
    assert stored['meta'] == dict(source='static.pth', dataset_meta=dict(classes=('a',)))
    config = Config.fromfile(root / DEMO)
    config.model.backbone.cell_num_ratio = 4
    result = build_model(config).load_state_dict(stored['state_dict'])
    assert not result.missing_keys and not result.unexpected_keys


def test_a_backbone_is_converted_for_temperature_1(run_here, static, tmp_path):
    state = torch.load(static, weights_only=True)['state_dict']
    state = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')}
    source, target = tmp_path / 'backbone.pth', tmp_path / 'kw.pth'
    torch.save(state, source)
    options = ['--shape', 64, 64, '--cfg-options', 'model.backbone.start_tau=1']
    out = run_here('convert', source, target, '--config', DEMO, *options)
    assert 'for a start at temperature 1' in out
    stored = torch.load(target, weights_only=True)
    assert stored['meta']['temperature'] == 1
    assert 'layer1.0.conv1.attention.fc1.weight' in stored['state_dict']
    other = tmp_path / 'b.pth'
    message = run_here('convert', target, other, '--config', DEMO, fails=True)
    assert 'is a KernelWarehouse checkpoint, not a static one' in message
    message = run_here('convert', source, other, fails=True)
    assert 'If it is of a static network' in message and '--config CONFIG' in message
    message = run_here('convert', source, target, '--config', DEMO, fails=True)
    assert 'exists; remove it' in message
    assert not other.exists()


def test_a_neck_and_a_head_are_compared_too(run_here, root, tmp_path):
    config = 'configs/retinanet/retinanet_r50_kw1x-fpn-head_1x_coco.py'
    with static_networks():
        model = build_model(Config.fromfile(root / config))
    torch.save(model.state_dict(), tmp_path / 'static.pth')
    arguments = [tmp_path / 'static.pth', tmp_path / 'kw.pth', '--config', config]
    out = run_here('convert', *arguments, '--shape', 64, 64)
    found = {line.split(':')[0]: line.split()[-1] for line in out.splitlines() if 'largest' in line}
    assert set(found) == {'neck', 'bbox_head'}
    assert all(float(value) < 1e-4 for value in found.values())


def test_layers_by_conv_cfg_are_planned_and_converted(run_here, root, static, tmp_path):
    config = tmp_path / 'a.py'
    layer = dict(type='mmkw.KWConv2d', cell_num_ratio=4)
    config.write_text(f"_base_ = '{root}/{DEMO}'\nmodel = dict(neck=dict(conv_cfg={layer}))\n")
    out = run_here('plan', config, '--budget-params', '10M')
    rows = [line.split(' | ') for line in out.splitlines() if line.startswith('| neck.')]
    neck = building.build_model(Config.fromfile(config), on_meta=True).neck
    own = {f'neck.{name}': m for name, m in neck.named_modules() if hasattr(m, 'warehouse_manager')}
    assert [row[0].removeprefix('| ') for row in rows] == list(own)
    for row, part in zip(rows, own.values()):
        cells, attention = part.cells.numel(), sum(p.numel() for p in part.attention.parameters())
        assert row[1:3] == ['1', '4'] and row[6:8] == [f'{cells:,}', f'{attention:,}']
    static_model = building.build_static(Config.fromfile(config), on_meta=True)
    stored = torch.load(static)['state_dict']
    parameters = sum(stored[name].numel() for name, _ in static_model.named_parameters())
    assert f'| parameters of the model | {parameters:,} | ' in out
    assert f'{next(iter(own))}: cell_num_ratio=' in out
    out = run_here('convert', static, tmp_path / 'kw.pth', '--config', config, '--shape', 64, 64)
    found = {line.split(':')[0]: line.split()[-1] for line in out.splitlines() if 'largest' in line}
    assert set(found) == {'backbone', *own}
    assert all(float(value) < 1e-4 for value in found.values()), found


def test_a_layer_at_several_places_is_static_at_all_of_them(run_here, tmp_path):
    """RTMDet's head has the same convolutions on every level."""
    config, base = tmp_path / 'a.py', 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
    config.write_text(
        f"_base_ = '{base}'\n"
        "model = dict(bbox_head=dict(conv_cfg=dict(type='mmkw.KWConv2d', cell_num_ratio=2)))\n"
    )
    static = building.build_model(building.read_config(base), on_meta=True)
    parameters = sum(p.numel() for p in static.parameters())
    assert f'| parameters of the model | {parameters:,} | ' in run_here('plan', config)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--shape', '64', '64'], '--shape is for --config CONFIG, which is not given'),
        (['--cfg-options', 'a=1'], '--cfg-options is for --config CONFIG, which is not given'),
        (['--config', DEMO, '--library', 'mmseg'], '--library mmseg is for a published checkpoint'),
    ],
)
def test_options_that_would_not_count_are_refused(run_here, static, tmp_path, options, message):
    target = tmp_path / 'kw.pth'
    assert message in run_here('convert', static, target, *options, fails=True)
    assert not target.exists()


def test_a_static_checkpoint_of_another_depth_is_refused(run_here, tmp_path):
    config = 'configs/mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py'
    from mmdet.models import ResNet

    torch.save(ResNet(18).state_dict(), tmp_path / 'static.pth')
    arguments = [tmp_path / 'static.pth', tmp_path / 'kw.pth', '--config', config]
    message = run_here('convert', *arguments, fails=True)
    assert 'It was made for another architecture' in message
    assert not (tmp_path / 'kw.pth').exists()


@pytest.mark.parametrize('change', ['nan', 'folder', 'small', 'disk'])
def test_what_is_not_converted_is_told_and_not_written(
    run_here, static, tmp_path, change, full_disk
):
    state, shape = torch.load(static, weights_only=True)['state_dict'], ('64', '64')
    source, target = tmp_path / 'static.pth', tmp_path / 'kw.pth'
    if change == 'nan':
        # No kernel, and so not looked at while it is read; the static network has it, too.
        state['backbone.layer3.0.bn1.bias'][0] = torch.nan
    torch.save(dict(state_dict=state), source)
    target = target if change != 'folder' else tmp_path / 'nowhere/kw.pth'
    shape = ('1', '1') if change == 'small' else shape
    options = ['--config', DEMO, '--shape', *shape]
    with full_disk() if change == 'disk' else nullcontext():
        message = run_here('convert', source, target, *options, fails=True)
    told = {
        'nan': 'are no numbers',
        'folder': 'there is no folder',
        'small': 'at least 4',
        'disk': 'could not be written: File too large. Make room',
    }
    assert told[change] in message
    assert set(tmp_path.iterdir()) == {source}
