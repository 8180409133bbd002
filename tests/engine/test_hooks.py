"""The temperature and seed hooks, in real MMEngine runners."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmkw.engine.hooks import IterationSeedHook, TemperatureHook
from mmkw.layers import KWConv2d


class Model(BaseModel):
    """Records the temperature and a random draw of every training step."""

    def __init__(self):
        super().__init__()
        self.conv = KWConv2d(3, 4, 3)
        self.seen = []
        self.draws = []
        self.images = []

    def forward(self, inputs, mode):
        if mode == 'loss':
            self.images.append([float(image[0, 0, 0]) for image in inputs])
            self.seen.append(self.conv.attention.temperature)
            self.draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
            return dict(loss=self.conv(torch.stack(inputs)).square().mean())
        return []


class Noise(Dataset):
    """Images drawn anew whenever they are asked for, as by an augmentation."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 5, 5) + np.random.rand() + random.random())


def make_runner(work_dir, hooks, epochs=4, by_epoch=True, model=None, loader=None, **kwargs):
    torch.manual_seed(0)
    train_cfg = dict(by_epoch=True, max_epochs=epochs)
    if not by_epoch:
        train_cfg = dict(by_epoch=False, max_iters=epochs * 3)
    return Runner(
        model or Model(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Noise(),
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
            batch_size=2,
            collate_fn=dict(type='pseudo_collate'),
            **(loader or dict(num_workers=0)),
        ),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook', interval=1 if by_epoch else 3, by_epoch=by_epoch
            ),
        ),
        custom_hooks=hooks,
        randomness=dict(seed=3),
        experiment_name=f'{work_dir}-{random.random()}',
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
        log_processor=dict(by_epoch=by_epoch),
        **kwargs,
    )


def logged_temperatures(work_dir):
    lines = []
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    return [line['temperature'] for line in lines]


@pytest.mark.parametrize('by_epoch', [True, False])
def test_temperature_falls_linearly_and_is_logged(tmp_path, by_epoch):
    hook = dict(type='mmkw.TemperatureHook', length=2 if by_epoch else 6, by_epoch=by_epoch)
    runner = make_runner(tmp_path, [hook], by_epoch=by_epoch)
    runner.train()
    # tau = max(0, (T - (i + 1)) / T) with T = 6 of 12 iterations.
    expected = [max(0, (6 - (i + 1)) / 6) for i in range(12)]
    assert runner.model.seen == pytest.approx(expected)
    assert logged_temperatures(tmp_path) == pytest.approx(expected, abs=1e-4)


def test_temperature_between_other_ends(tmp_path):
    runner = make_runner(
        tmp_path, [dict(type='mmkw.TemperatureHook', length=4, begin=0.2, end=0.6)]
    )
    runner.train()
    assert runner.model.seen[0] == pytest.approx(0.2 + 0.4 / 12)
    assert runner.model.seen[-1] == pytest.approx(0.6)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_resuming_restores_temperature_and_random_numbers(tmp_path, by_epoch, workers):
    loader = dict(num_workers=workers)
    temperature = dict(length=3 if by_epoch else 9, by_epoch=by_epoch)
    hooks = [
        dict(type='mmkw.TemperatureHook', **temperature),
        dict(type='mmkw.IterationSeedHook'),
    ]
    options = dict(by_epoch=by_epoch, loader=loader)
    whole = make_runner(tmp_path / 'whole', hooks, **options)
    whole.train()
    make_runner(tmp_path / 'parts', hooks, epochs=2, **options).train()
    rest = make_runner(tmp_path / 'parts', hooks, resume=True, **options)
    rest.train()
    assert len(rest.model.seen) == 6
    assert rest.model.seen == whole.model.seen[6:]
    assert rest.model.draws == whole.model.draws[6:]
    assert rest.model.images == whole.model.images[6:]
    # No image comes twice, also not in another epoch.
    assert len({value for batch in whole.model.images for value in batch}) == 24
    assert logged_temperatures(tmp_path / 'parts') == pytest.approx(whole.model.seen, abs=1e-4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.parametrize('by_epoch', [False, True])
def test_workers_that_go_on_from_epoch_to_epoch_are_told(tmp_path, persistent, by_epoch):
    loader = dict(num_workers=1, persistent_workers=persistent)
    runner = make_runner(tmp_path, [], by_epoch=by_epoch, loader=loader)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    if not by_epoch:
        runner.train_loop.dataloader_iterator = iter(())
    IterationSeedHook().before_train(runner)
    (log,) = tmp_path.glob('*/*.log')
    assert ('persistent_workers=False' in log.read_text()) == (persistent and by_epoch)


def test_without_the_hook_the_temperature_is_zero(tmp_path):
    runner = make_runner(tmp_path, [], epochs=1)
    runner.train()
    assert runner.model.seen == [0, 0, 0]


def test_a_checkpoint_is_tested_at_the_temperature_it_was_saved_at(tmp_path):
    hooks = [dict(type='mmkw.TemperatureHook', length=4)]
    make_runner(tmp_path, hooks, epochs=1).train()
    runner = make_runner(tmp_path / 'test', hooks)
    runner.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    assert runner.model.conv.attention.temperature == pytest.approx(0.75)
    # Training starts its own schedule from the loaded weights.
    runner.train()
    assert runner.model.seen[0] == pytest.approx(11 / 12)


def test_a_model_without_dynamic_layers_is_refused_before_training(tmp_path):
    model = Model()
    model.conv = nn.Conv2d(3, 4, 3)
    runner = make_runner(tmp_path, [dict(type='mmkw.TemperatureHook', length=1)], model=model)
    with pytest.raises(ValueError, match='Model has no KernelWarehouse layer'):
        runner.train()
    assert model.seen == []


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(length=0), 'length must be an integer of at least 1, got 0'),
        (dict(length=2.5), 'length must be an integer of at least 1, got 2.5'),
        (dict(length=1, begin='1'), r"begin must be a number in \[0, 1\], got '1'"),
        (dict(length=1, end=None), r'end must be a number in \[0, 1\], got None'),
        (dict(length=1, begin=1.5), r'begin must be a number in \[0, 1\], got 1.5'),
        (dict(length=1, end=-1), r'end must be a number in \[0, 1\], got -1'),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f'TemperatureHook: {message}'):
        TemperatureHook(**arguments)


@pytest.mark.parametrize('wrong', ['no', None, 1])
def test_a_schedule_counts_epochs_or_does_not(wrong):
    with pytest.raises(TypeError, match=f'by_epoch must be True or False, got {wrong!r}'):
        TemperatureHook(length=3, by_epoch=wrong)


def test_draws_differ_between_iterations(tmp_path):
    runner = make_runner(tmp_path, [IterationSeedHook()], epochs=2)
    runner.train()
    assert len(set(runner.model.draws)) == 6
