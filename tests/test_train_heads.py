"""Dynamic heads train as static ones do, from a static checkpoint of other classes."""

import re
import sys

import pytest
import torch
from command_util import run, scalars
from conftest import exhaustively
from mmengine.config import Config
from mmengine.hooks import Hook

from mmkw.engine import building
from mmkw.engine.command_line import build_runner
from mmkw.layers import StandsForStatic

pytest.importorskip('mmdet', reason="trains MMDetection's detectors")

# Four steps with the same images, at a rate at which the loss falls.
COMMON = """
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(custom_keys={keys}))
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
load_from = '{load_from}'
"""
DETECTION = """
_base_ = '{root}/configs/demo/mask-rcnn_r18_fpn_mini-coco.py'
train_dataloader = dict(batch_size=4, dataset=dict(data_root='{data}/'))
val_dataloader = dict(dataset=dict(data_root='{data}/'))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='{data}/annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=4, val_interval=4)
backbone = dict(base_channels=8, frozen_stages=1)
neck = dict(in_channels=[8, 16, 32], out_channels=32)
"""
FASTER_RCNN = """
model = dict(
    type='FasterRCNN',
    backbone=backbone,
    neck=neck,
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(
            _delete_=True,
            type='Shared2FCBBoxHead',
            in_channels=32,
            fc_out_channels=64,
            num_classes=10,
        ),
        mask_head=None,
        mask_roi_extractor=None,
    ),
)
"""
RETINANET = """
model = dict(
    _delete_=True,
    type='RetinaNet',
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(_base_.model.backbone, **backbone),
    neck=dict(_base_.model.neck, **neck),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[4, 8, 16, 32],
        ),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=200, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50
    ),
)
"""
SEGMENTOR = """
_base_ = '{root}/configs/demo/fpn_r18_mini-coco-semantic.py'
train_dataloader = dict(batch_size=4, dataset=dict(data_root='{data}'))
val_dataloader = dict(dataset=dict(data_root='{data}'))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
model = dict(
    backbone=dict(base_channels=8, frozen_stages=1),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=32, dropout_ratio=0.0),
)
"""
DYNAMIC = """
_base_ = '{static}'
model = dict({override})
"""


class Case:
    """A head of a library, in a model.

    Args:
        config: The static config.
        head: Its place in the model.
        override: What makes it dynamic, in a config that inherits the static one.
        keys: Rates by names.
        frozen: A layer of the head, or several.
        predicting: The layers of the head that depend on the number of classes.
    """

    def __init__(self, config, head, override, keys, frozen, predicting):
        self.config, self.head, self.override = config, head, override
        self.keys, self.frozen, self.predicting = keys, frozen, predicting


CASES = {
    'Shared2FCBBoxHead': Case(
        DETECTION + FASTER_RCNN,
        'roi_head.bbox_head',
        "roi_head=dict(bbox_head=dict(type='mmkw.KWModule', "
        "module=dict(type='Shared2FCBBoxHead'), cell_num_ratio=2))",
        {'bbox_head': dict(lr_mult=2.0), 'shared_fcs.1': dict(lr_mult=3.0)},
        'shared_fcs.0',
        ['fc_cls', 'fc_reg'],
    ),
    'RetinaHead': Case(
        DETECTION + RETINANET,
        'bbox_head',
        "bbox_head=dict(type='mmkw.KWModule', module=dict(type='RetinaHead'))",
        {'bbox_head': dict(lr_mult=2.0), 'bbox_head.cls_convs': dict(lr_mult=3.0)},
        'reg_convs',
        ['retina_cls'],
    ),
    'FPNHead': Case(
        SEGMENTOR,
        'decode_head',
        "decode_head=dict(type='mmkw.KWModule', module=dict(type='FPNHead'))",
        {'decode_head': dict(lr_mult=2.0), 'scale_heads.1': dict(lr_mult=3.0)},
        'scale_heads.0',
        ['conv_seg'],
    ),
}


@pytest.fixture(params=exhaustively(CASES, ['RetinaHead', 'FPNHead']))
def case(request):
    if request.param == 'FPNHead':
        pytest.importorskip('mmseg', reason='trains a segmentor')
    return CASES[request.param]


def configs_of(case, root, data, folder):
    """The paths of the static and of the dynamic config."""
    paths = folder / 'static.py', folder / 'dynamic.py'
    words = dict(root=root, data=data, keys=case.keys, load_from=folder / 'other_classes.pth')
    paths[0].write_text((case.config + COMMON).format(**words))
    paths[1].write_text(DYNAMIC.format(static=paths[0], override=case.override))
    return paths


def save_other_classes(case, path, out):
    """Saves a static model of seven classes, with values that no initialiser gives."""
    config = Config.fromfile(path)
    part = config.model
    for name in case.head.split('.'):
        part = part[name]
    part.num_classes = 7
    torch.manual_seed(7)
    model = building.build_model(config)
    model.init_weights()
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            size = 0.02 if 'var' in name else 0.1 * float(value.std() if value.numel() > 1 else 1)
            value.add_(torch.randn_like(value).abs() * size)
    torch.save(dict(meta={}, state_dict=state), out)
    return state


class Watch(Hook):
    """Freezes a part, gives predictions, and notes the start of a training and its losses."""

    def __init__(self, frozen, predictions=None):
        self.frozen, self.predictions = frozen, predictions
        self.losses = []

    def before_train(self, runner):
        if self.predictions is not None:
            own = runner.model.state_dict()
            for name, value in self.predictions.items():
                own[name].copy_(value)
        runner.model.get_submodule(self.frozen).requires_grad_(False)
        self.start = values(runner.model)
        groups = runner.optim_wrapper.param_groups
        self.rates = {parameter: group['lr'] for group in groups for parameter in group['params']}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(y) for name, y in outputs.items() if 'loss' in name})


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def runner_of(path, work_dir, *hooks, **options):
    config = Config.fromfile(path)
    config.merge_from_dict(options)
    config.launcher, config.work_dir = 'none', str(work_dir)
    config.experiment_name = f'{work_dir.parent.name}-{work_dir.name}-{len(options)}'
    runner = build_runner(config)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


@pytest.mark.slow
def test_from_a_static_checkpoint_of_other_classes(case, root, mini_coco, tmp_path):
    static_path, dynamic_path = configs_of(case, root, mini_coco, tmp_path)
    stored = save_other_classes(case, static_path, tmp_path / 'other_classes.pth')
    place, frozen = f'{case.head}.', f'{case.head}.{case.frozen}'
    predicting = tuple(f'{place}{name}.' for name in case.predicting)

    watch = Watch(frozen)
    static = runner_of(static_path, tmp_path / 'static', watch)
    static.train()
    predictions = {n: value for n, value in watch.start.items() if n.startswith(predicting)}
    assert len(predictions) == 2 * len(predicting)
    for name, value in watch.start.items():
        if name not in predictions:
            assert torch.equal(value, stored[name]), name
        elif name.endswith('weight'):
            assert value.shape != stored[name].shape

    dynamic_watch = Watch(frozen, predictions)
    dynamic = runner_of(dynamic_path, tmp_path / 'dynamic', dynamic_watch)
    dynamic.train()
    start, rates = dynamic_watch.start, dynamic_watch.rates
    head = dynamic.model.get_submodule(case.head)
    assert type(head) is type(static.model.get_submodule(case.head))
    # What both have is the same, and so is what the dynamic layers compute.
    assert all(
        torch.equal(start[name], value) for name, value in watch.start.items() if name in start
    )
    expected, found = watch.losses, dynamic_watch.losses
    assert len(expected) == len(found) == 4
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for losses in (expected, found):
        assert losses[3]['loss'] < losses[0]['loss']

    # Rates: of a warehouse the largest of its layers' in the static run.
    base = dynamic.optim_wrapper.defaults['lr']
    given = {
        name: watch.rates[p] for name, p in static.model.named_parameters() if p in watch.rates
    }
    of_cells = set()
    for partition, cells in zip(head.warehouse_manager.partitions, head.warehouse_manager.weights):
        layers = [share.kernel.layer for share in partition.layers]
        rate = max(given[f'{place}{layer}.weight'] for layer in layers)
        assert rates[cells] == rate
        of_cells.add(rate / base)
    assert of_cells == {2.0, 3.0}

    # What learns has moved, what is frozen has not.
    end = values(dynamic.model)
    for index, partition in enumerate(head.warehouse_manager.partitions):
        name = f'{place}warehouse_manager.weights.{index}'
        layers = [f'{place}{share.kernel.layer}.' for share in partition.layers]
        still = all(layer.startswith(f'{frozen}.') for layer in layers)
        assert torch.equal(start[name], end[name]) == still, name
    for name, module in head.named_modules():
        if isinstance(module, StandsForStatic):
            name = f'{place}{name}.'
            still = name.startswith(f'{frozen}.')
            weight = f'{name}attention.fc2.weight'
            assert torch.equal(start[weight], end[weight]) == still, weight
    kept = [n for n in start if n.startswith(('backbone.conv1', 'backbone.layer1'))]
    assert kept and all(torch.equal(start[name], end[name]) for name in kept)

    # What is saved is what was trained, and goes on as it would have.
    metrics = dynamic.val_loop.run()
    last, middle = [sorted((tmp_path / 'dynamic').glob(f'*_{step}.pth'))[0] for step in (4, 2)]
    tested = runner_of(dynamic_path, tmp_path / 'tested', load_from=str(last)).test()
    assert tested == metrics
    rest = runner_of(
        dynamic_path, tmp_path / 'rest', Watch(frozen), load_from=str(middle), resume=True
    )
    rest.train()
    again = rest.model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in end.items())


def test_from_the_command_line(root, mini_coco, tmp_path):
    case = CASES['Shared2FCBBoxHead']
    static_path, path = configs_of(case, root, mini_coco, tmp_path)
    save_other_classes(case, static_path, tmp_path / 'other_classes.pth')
    command = [sys.executable, 'tools/train.py', path, '--work-dir', tmp_path / 'work']
    options = ['--cfg-options', 'train_cfg.max_epochs=2', 'train_cfg.val_interval=2']
    result, output = run(root, *command, *options)
    assert result.returncode == 0, output
    assert 'Shared2FCBBoxHead: static checkpoint, 2 kernels into 2 warehouses' in output
    assert set(re.findall(r'size mismatch for (\S+)\.(?:weight|bias)', output)) == {
        f'{case.head}.{name}' for name in case.predicting
    }
    assert 'missing keys' not in output and 'unexpected key' not in output
    losses = [line['loss'] for line in scalars(tmp_path / 'work') if 'loss' in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert 'coco/bbox_mAP' in output and (tmp_path / 'work/epoch_2.pth').exists()
