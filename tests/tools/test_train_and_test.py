"""tools/train.py, tools/test.py and the scripts around them, as subprocesses."""

import argparse
import os
import pickle
import runpy
import socket
import sys
from contextlib import nullcontext

import pytest
import torch
from command_util import run, scalars
from mmengine.config import Config

from mmkw.engine.command_line import check_data

pytest.importorskip('mmdet', reason="runs MMDetection's configs")
DEMO = 'configs/demo/mask-rcnn_kw1x-r18_fpn_annealed_mini-coco.py'


def tiny(data):
    """Overrides that shrink the demo to seconds."""
    options = ['model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32]']
    options += ['train_dataloader.batch_size=2', 'default_hooks.logger.interval=1']
    for loader in ('train', 'val', 'test'):
        options.append(f'{loader}_dataloader.dataset.data_root={data}/')
    for evaluator in ('val', 'test'):
        options.append(f'{evaluator}_evaluator.ann_file={data}/annotations/instances_val.json')
    return options


@pytest.fixture(scope='module')
def trained(root, mini_coco, tmp_path_factory):
    """A work folder after one of two epochs."""
    work_dir = tmp_path_factory.mktemp('train')
    command = [sys.executable, 'tools/train.py', DEMO, '--work-dir', work_dir, '--cfg-options']
    result, output = run(root, *command, *tiny(mini_coco), 'train_cfg.max_epochs=1')
    assert result.returncode == 0, output
    assert 'eta:' in output and 'temperature: 0.5000' in output and 'coco/segm_mAP' in output
    return work_dir


def test_resume(root, mini_coco, trained, tmp_path):
    """From the latest checkpoint, and from a named one into another folder."""
    command = [sys.executable, 'tools/train.py', DEMO]
    options = ['--cfg-options', *tiny(mini_coco), 'train_cfg.max_epochs=2']
    options += ['custom_hooks.0.length=2']
    result, output = run(root, *command, '--work-dir', trained, '--resume', *options)
    assert result.returncode == 0, output
    assert 'resumed epoch: 1, iter: 2' in output
    steps = [line for line in scalars(trained) if 'temperature' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4]
    # One epoch at a length of one, then the third and fourth iteration at a length of two.
    assert [line['temperature'] for line in steps] == pytest.approx([0.5, 0, 0.25, 0])

    path = trained / 'epoch_1.pth'
    result, output = run(root, *command, '--work-dir', tmp_path, '--resume', path, *options)
    assert result.returncode == 0, output
    assert 'resumed epoch: 1, iter: 2' in output
    again = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['state_dict']
    first = torch.load(trained / 'epoch_2.pth', weights_only=False)['state_dict']
    assert all(torch.equal(again[name], first[name]) for name in first)

    # Where there is nothing to resume from, as the config says.
    folder = tmp_path / 'new'
    options = ['--cfg-options', *tiny(mini_coco), 'train_cfg.max_epochs=0', f'load_from={path}']
    result, output = run(root, *command, '--work-dir', folder, '--resume', *options)
    assert result.returncode == 0 and f'Load checkpoint from {path}' in output, output


def test_test(root, mini_coco, trained, tmp_path):
    out, pictures = tmp_path / 'results.pkl', tmp_path / 'pictures'
    command = [sys.executable, 'tools/test.py', DEMO, trained / 'epoch_1.pth']
    options = ['--work-dir', tmp_path, '--out', out, '--show-dir', pictures]
    # A config that resumes its training is tested without the data of the training.
    options += ['--cfg-options', *tiny(mini_coco)]
    options += ['resume=True', f'train_dataloader.dataset.data_root={tmp_path}/no/']
    result, output = run(root, *command, *options)
    assert result.returncode == 0 and 'resumed' not in output, output
    assert 'coco/bbox_mAP' in output and 'coco/segm_mAP' in output
    assert len(pickle.loads(out.read_bytes())) == 2
    assert len(list(pictures.glob('*.png'))) == 2

    # MMDetection merges boxes only.
    options = ['--work-dir', tmp_path, '--tta', '--cfg-options', 'test_evaluator.metric=bbox']
    options += ['model.type=FasterRCNN', 'model.roi_head.mask_head=None']
    options += ['model.roi_head.mask_roi_extractor=None']
    result, output = run(root, *command, *options, *tiny(mini_coco))
    assert result.returncode == 0, output
    assert 'coco/bbox_mAP' in output


FOUND = {
    'downloads itself': dict(type='CIFAR10', data_root='no/'),
    'another backend': dict(type='CocoDataset', data_root='no/', backend_args=dict(backend='s3')),
    'address': dict(type='CocoDataset', data_root='s3://no/', ann_file='a.json'),
    'absolute': dict(type='CocoDataset', data_root='no/', ann_file=__file__),
    'relative': dict(type='CocoDataset', data_root='tests/', ann_file='tools/test_demo.py'),
    'nothing': dict(type='CocoDataset'),
}
MISSING = {
    'data_root: no/': dict(type='CIFAR10', data_root='no/', download=False),
    'ann_file: tests/a.json': dict(type='CocoDataset', data_root='tests/', ann_file='a.json'),
    'ann_file: /no/a.json': dict(type='CocoDataset', data_root='tests/', ann_file='/no/a.json'),
    'data_root: nowhere': dict(type='CocoDataset', data_root='nowhere', ann_file='a.json'),
}


@pytest.mark.parametrize('kind', [*FOUND, *MISSING])
def test_data_that_is_missing(root, kind, monkeypatch, capsys):
    monkeypatch.chdir(root)
    dataset = {**FOUND, **MISSING}[kind]
    loader = dict(dataset=dict(type='ConcatDataset', datasets=[dict(type='CocoDataset'), dataset]))
    config = Config(dict(train_dataloader=loader, val_evaluator=None))
    with pytest.raises(SystemExit) if kind in MISSING else nullcontext():
        check_data(argparse.ArgumentParser(), config, 'train_dataloader', 'val_evaluator', 'none')
    place = 'train_dataloader.dataset.datasets.1'
    assert kind in FOUND or f'{place}.{kind} does not exist' in capsys.readouterr().err


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes(root, mini_coco, tmp_path):
    options = ['--work-dir', tmp_path, '--auto-scale-lr', '--cfg-options', *tiny(mini_coco)]
    options += ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=1']
    options += ['auto_scale_lr.base_batch_size=4']
    environment = dict(PORT=free_port(), OMP_NUM_THREADS='1')
    result, output = run(root, 'tools/dist_train.sh', DEMO, 2, *options, **environment)
    assert result.returncode == 0, output
    assert "'find_unused_parameters': True" not in output
    assert 'Scaling the original LR by 0.5' in output
    assert 'coco/segm_mAP' in output and (tmp_path / 'epoch_1.pth').exists()


def test_the_script_for_several_tests_passes_its_arguments_on(root, tmp_path):
    """It starts processes as the one for trainings does."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', PORT='1234', NNODES='2')
    arguments = [DEMO, 'a.pth', '8', '--out', 'b.pkl']
    _, output = run(root, 'tools/dist_test.sh', *arguments, **environment)
    launch = '-m torch.distributed.run --nnodes=2 --node_rank=0 --nproc_per_node=8'
    test = f'tools/test.py {DEMO} a.pth --launcher pytorch --out b.pkl'
    assert f'{launch} --master_addr=127.0.0.1 --master_port=1234 {test}' in output


def test_slurm_scripts_pass_their_arguments_on(root, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='16', SRUN_ARGS='--qos high')
    arguments = ['part', 'job', DEMO, 'work', '--amp', '--resume']
    _, output = run(root, 'tools/slurm_train.sh', *arguments, **environment)
    assert '-p part --job-name=job --gres=gpu:8 --ntasks=16' in output and '--qos high' in output
    assert f'tools/train.py {DEMO} --work-dir=work --launcher=slurm --amp --resume' in output
    arguments = ['part', 'job', DEMO, 'a.pth', '--out', 'b.pkl']
    _, output = run(root, 'tools/slurm_test.sh', *arguments, **environment)
    assert f'tools/test.py {DEMO} a.pth --launcher=slurm --out b.pkl' in output


@pytest.mark.parametrize(
    'script, arguments, message',
    [
        ('train.py', ['--resume', 'no.pth'], 'checkpoint no.pth does not exist'),
        ('train.py', ['--amp'], '--amp needs an accelerator'),
        ('train.py', ['--auto-scale-lr'], '--auto-scale-lr needs auto_scale_lr.base_batch_size'),
        ('train.py', ['--cfg-options', 'load_from=no.pth'], 'checkpoint no.pth does not exist'),
        (
            'train.py',
            ['--resume', '--cfg-options', 'load_from=no.pth', 'work_dir=nowhere'],
            'checkpoint no.pth does not exist',
        ),
        ('test.py', ['no.pth'], 'checkpoint no.pth does not exist'),
        (
            'train.py',
            ['--cfg-options', 'model.backbone.type=KWResNet'],
            "model.backbone.type is 'KWResNet', a type of mmkw: write 'mmkw.KWResNet'",
        ),
        (
            'test.py',
            ['README.md', '--cfg-options', 'custom_hooks.0.type=TemperatureHook'],
            "custom_hooks.0.type is 'TemperatureHook', a type of mmkw: write 'mmkw.Temperature",
        ),
        (
            'train.py',
            ['--cfg-options', 'model.backbone.pretrained=no.pth'],
            'model.backbone.pretrained: no.pth does not exist. For another place use '
            '--cfg-options model.backbone.pretrained=PATH',
        ),
        (
            'train.py',
            ['--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None'],
            '--auto-scale-lr needs auto_scale_lr.base_batch_size',
        ),
        ('train.py', ['--cfg-options', 'model=3'], 'has the model 3, which is no dict'),
        ('train.py', ['--cfg-options', 'model'], '--cfg-options model: not a key=value'),
        (
            'test.py',
            ['README.md', '--out', 'a.json'],
            '--out must end in .pkl or .pickle, got a.json',
        ),
    ],
)
def test_mistakes_end_with_a_usage_error(root, script, arguments, message):
    if '--amp' in arguments and torch.cuda.is_available():
        pytest.skip('there is an accelerator')
    result, output = run(root, sys.executable, f'tools/{script}', DEMO, *arguments)
    assert result.returncode == 2 and message in output


@pytest.mark.parametrize('part', ['data', 'damaged', 'budget', 'folder'])
@pytest.mark.parametrize('script', ['train.py', 'test.py'])
def test_what_cannot_be_read_ends_with_a_usage_error(
    root, mini_coco, trained, tmp_path, script, part
):
    """Without a trace of the libraries, and before anything is trained."""
    file, work = trained / 'epoch_1.pth', tmp_path / 'work'
    options = tiny(mini_coco)
    message = 'With cell_num_ratio=1 it would fit.'
    if part == 'data':
        loader = 'train' if script == 'train.py' else 'test'
        place = f'{loader}_dataloader.dataset.data_root'
        options.append(f'{place}={tmp_path}/no/')
        message = f'{place}: {tmp_path}/no/ does not exist. For another place use --cfg-options'
    elif part == 'damaged':
        file = tmp_path / 'damaged.pth'
        file.write_bytes((trained / 'epoch_1.pth').read_bytes()[:5000])
        message = str(file)
    elif part == 'budget':
        options.append('model.backbone.cell_num_ratio=2')
    else:
        work.touch()
        message = f'--work-dir {work} is a file'
    command = [sys.executable, f'tools/{script}', DEMO, '--work-dir', work]
    command += ['--resume' if script == 'train.py' else '--launcher=none', file][
        script != 'train.py' :
    ]
    result, output = run(root, *command, '--cfg-options', *options)
    assert result.returncode == 2 and 'Traceback' not in output, output
    assert message in output and not list(work.glob('*/vis_data/*.json'))


@pytest.mark.parametrize('config', ['no.py', 'foo::x.py', 'configs/_base_/backbones/kw1x-r50.py'])
def test_a_config_that_is_none_ends_with_a_usage_error(root, config):
    command = (
        ['tools/test.py', config, 'README.md'] if '::' in config else ['tools/train.py', config]
    )
    result, output = run(root, sys.executable, *command)
    assert result.returncode == 2 and f'error: config {config}' in output, output


def test_missing_imagenet_weights_are_named_before_anything_starts(root, tmp_path):
    config = 'configs/faster_rcnn/faster-rcnn_kw1x-r50_fpn_1x_coco.py'
    command = [sys.executable, 'tools/train.py', config, '--work-dir', tmp_path / 'work']
    result, output = run(root, *command)
    assert result.returncode == 2 and not (tmp_path / 'work').exists()
    message = (
        'model.backbone.init_cfg.checkpoint: checkpoints/kw1x_resnet50.pth does not exist. '
        'Download the weights (KernelWarehouse 1x ResNet50, ImageNet top-1 80.38, '
    )
    assert message in output
    # The way out that the message gives: the next thing that is missing is COCO.
    result, output = run(root, *command, '--cfg-options', 'model.backbone.init_cfg=None')
    assert result.returncode == 2 and not (tmp_path / 'work').exists()
    assert 'train_dataloader.dataset.data_root: data/coco/ does not exist. For' in output


def test_a_config_without_default_scope_names_its_library_by_types(root, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{root}/{DEMO}'\ndefault_scope = None\nmodel = dict(type='mmdet.MaskRCNN')\n"
    )
    result, output = run(root, sys.executable, '-m', 'mmkw', 'plan', config)
    assert result.returncode == 0 and 'backbone (ResNet)' in output, output

    script = runpy.run_path(str(root / 'tools/test.py'))
    parser = argparse.ArgumentParser()
    for scope, kind, name in (
        (None, 'mmdet.MaskRCNN', 'mmdet'),
        (None, 'mmseg.EncoderDecoder', 'mmseg'),
        ('mmseg', 'EncoderDecoder', 'mmseg'),
    ):
        evaluator = dict(type=f'{name}.IoUMetric' if name == 'mmseg' else 'mmdet.CocoMetric')
        config = Config(dict(default_scope=scope, model=dict(type=kind), test_evaluator=evaluator))
        assert script['library_of'](config) == name
        script['dump_predictions'](parser, config, 'out.pkl')
        if name == 'mmseg':
            assert config.test_evaluator.output_dir == 'out.pkl'
        else:
            assert config.test_evaluator[1].type == 'mmdet.DumpDetResults'
        arguments = argparse.Namespace(show=False, show_dir='pictures', wait_time=2)
        config.visualizer = dict(type='Visualizer')
        script['show_predictions'](config, arguments)
        assert config.default_hooks.visualization.draw
    config.test_evaluator = [dict(type='mmseg.DepthMetric')]
    with pytest.raises(SystemExit):
        script['dump_predictions'](parser, config, 'out')
