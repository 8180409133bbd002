"""Averages of parameters over the steps of a training run, of a dynamic network and its twin."""

import copy
import math

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, ExponentialMovingAverage, StochasticWeightAverage
from mmengine.runner import Runner
from small_networks import LAYERS, images, twins
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from mmkw import set_temperature
from mmkw.layers.attention import Attention

close = torch.testing.assert_close


def steps(network, count=3):
    """Trains, with a pause after every step."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for x in images(*[(6, 6)] * count):
        optimiser.zero_grad()
        network.train()(x).square().mean().backward()
        optimiser.step()
        yield


def loaded(network, values):
    """A copy of a network with other values, by name; the copy's own way of being evaluated."""
    twin = copy.deepcopy(network)
    twin.load_state_dict(values)
    return twin.eval()


def exponential(average, value, number):
    return value if number == 0 else 0.7 * average + 0.3 * value


def mean(average, value, number):
    return (average * number + value) / (number + 1)


def momentum_of_yolox(average, value, number):
    momentum = 0.7 * math.exp(-(1 + number) / 2) + 0.3
    return value if number == 0 else (1 - momentum) * average + momentum * value


def yolox(network):
    layers = pytest.importorskip('mmdet.models.layers', reason="needs MMDetection's EMA")
    return layers.ExpMomentumEMA(network, momentum=0.3, gamma=2, update_buffers=True)


# By name: what averages, the same for one value written out.
AVERAGES = {
    'mean': (lambda n: AveragedModel(n, use_buffers=True), mean),
    # PyTorch's own does not take the counters of a norm.
    'means': (lambda n: AveragedModel(n, multi_avg_fn=get_swa_multi_avg_fn()), mean),
    'exponential': (
        lambda n: AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True),
        exponential,
    ),
    'mmengine mean': (lambda n: StochasticWeightAverage(n, update_buffers=True), mean),
    'mmengine exponential': (
        lambda n: ExponentialMovingAverage(n, momentum=0.3, update_buffers=True),
        exponential,
    ),
    'mmdet exponential': (yolox, momentum_of_yolox),
}


@pytest.mark.parametrize('how', AVERAGES)
def test_an_average_is_that_of_all_parameters(how):
    make, rule = AVERAGES[how]
    for network in twins():
        averaged, expected = make(network), None
        for number, _ in enumerate(steps(network)):
            averaged.update_parameters(network)
            state = copy.deepcopy(network.state_dict())
            if expected is None:
                expected = state
            all_of_it = getattr(averaged, 'use_buffers', True)
            learned = dict(network.named_parameters())
            for name, value in state.items():
                if name in learned or (all_of_it and value.is_floating_point()):
                    expected[name] = rule(expected[name], value, number)
                else:
                    expected[name] = value
        (x,) = images((7, 9))
        right = loaded(network, expected)(x)
        close(averaged.eval()(x), right, rtol=1e-4, atol=1e-5)
        assert (network.eval()(x) - right).abs().max() > 1e-3


def test_an_averaged_network_mixes_its_own_cells():
    network, (x,) = twins()[0].eval(), images((7, 9))
    averaged = AveragedModel(network)
    expected = network(x)
    cells = averaged.module.warehouse_manager.weights[0]
    for name in LAYERS:
        assert averaged.module.get_submodule(name).cells is cells
    with torch.no_grad():
        network.warehouse_manager.weights[0].zero_()
    close(averaged.eval()(x), expected, rtol=0, atol=0)
    # A temperature is no tensor, hence a copy's own.
    set_temperature(network, 0.5)
    assert {m.temperature for m in averaged.modules() if isinstance(m, Attention)} == {0.0}
    set_temperature(averaged, 0.5)
    assert not torch.equal(averaged(x), expected)


class Trained(BaseModel):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, mode='tensor'):
        y = self.network(torch.stack(inputs))
        return dict(loss=y.square().mean()) if mode == 'loss' else [y]


class Seen(BaseMetric):
    """Keeps what the network gave when it was validated."""

    def process(self, data_batch, data_samples):
        self.last = data_samples[0].clone()
        self.results.append(0)

    def compute_metrics(self, results):
        return {}


def runner(network, folder, seen, epochs, **options):
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    data = [dict(inputs=image) for image in images]
    loader = dict(
        batch_size=2,
        dataset=data,
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    return Runner(
        Trained(network),
        str(folder),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        val_dataloader=loader,
        val_evaluator=[seen],
        val_cfg=dict(),
        custom_hooks=[dict(type='EMAHook', momentum=0.3, update_buffers=True)],
        default_hooks=dict(logger=None),
        default_scope='mmengine',
        log_level='ERROR',
        experiment_name=f'{folder.name}_{epochs}',
        **options,
    )


def average_of(run):
    (hook,) = (hook for hook in run.hooks if isinstance(hook, EMAHook))
    return hook.ema_model.module.network


@pytest.mark.parametrize('index', [0, 1], ids=['dynamic', 'static'])
def test_a_run_with_averages(index, tmp_path):
    """Validated by the average, resumed with it, and loaded as a network of its own."""
    seen = Seen()
    whole = runner(twins()[index], tmp_path / 'whole', seen, 2)
    whole.train()
    network, average = whole.model.network.eval(), average_of(whole).eval()
    x = torch.stack([image['inputs'] for image in whole.val_dataloader.dataset[2:]])
    # The last results are the average's; the parameters have come back.
    close(seen.last, average(x))
    assert (network(x) - average(x)).abs().max() > 1e-3

    first = runner(twins()[index], tmp_path / 'parts', Seen(), 1)
    first.train()
    resumed = runner(twins()[index], tmp_path / 'parts', Seen(), 2, resume=True)
    resumed.train()
    for found, expected in ((resumed.model.network, network), (average_of(resumed), average)):
        close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)

    file = tmp_path / 'whole' / 'epoch_2.pth'
    plain = Trained(twins()[index])
    plain.load_state_dict(torch.load(file, weights_only=False)['state_dict'])
    close(plain.network.eval()(x), average(x))


def test_a_static_checkpoint_starts_the_average_too(tmp_path):
    dynamic, static = twins()
    torch.save(dict(state_dict=Trained(static).state_dict()), tmp_path / 'static.pth')
    run = runner(dynamic, tmp_path / 'run', Seen(), 1, load_from=str(tmp_path / 'static.pth'))
    run.call_hook('before_run')
    run.load_or_resume()
    (x,) = images((7, 9))
    for network in (run.model.network, average_of(run)):
        close(network.eval()(x), static.eval()(x), rtol=1e-3, atol=1e-3)


def test_a_frozen_warehouse_stays_frozen_under_averages():
    network = twins()[0]
    for name in LAYERS:
        network.get_submodule(name).requires_grad_(False)
    averaged = ExponentialMovingAverage(network, momentum=0.3)
    before = averaged.module.warehouse_manager.weights[0].clone()
    for _ in steps(network):
        averaged.update_parameters(network)
    close(averaged.module.warehouse_manager.weights[0], before, rtol=0, atol=0)
    close(network.warehouse_manager.weights[0], before, rtol=0, atol=0)
