"""Training as users run it: interruptions, several processes, moving averages."""

import socket

import pytest
import torch
from distributed_worker import (
    REFUSED,
    SHARDED,
    gradients,
    images,
    loss_of,
    make_network,
    work,
    work_sharded,
)
from mmengine.config import Config
from mmengine.hooks import Hook

pytest.importorskip('mmdet', reason="trains MMDetection's detectors")


class Interrupt(Hook):
    """Stops the training in the middle of an epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            raise KeyboardInterrupt


DETECTION = {
    'train_cfg.max_epochs': 2,
    'model.neck.in_channels': [8, 16, 32],
}
SEGMENTATION = {
    'train_cfg.max_iters': 4,
    'default_hooks.checkpoint.interval': 2,
    'model.neck.in_channels': [8, 16, 32, 64],
}


@pytest.fixture
def demo(root, mini_coco, tmp_path):
    def make(name, *hooks, segmentation=False, **options):
        kind = (
            'fpn_kw1x-r18_mini-coco-semantic'
            if segmentation
            else 'mask-rcnn_kw1x-r18_fpn_annealed_mini-coco'
        )
        config = Config.fromfile(root / f'configs/demo/{kind}.py')
        config.merge_from_dict(SEGMENTATION if segmentation else DETECTION)
        config.merge_from_dict(
            {
                'train_dataloader.dataset.data_root': f'{mini_coco}/',
                'train_dataloader.batch_size': 2,
                # Weights are compared; the evaluation has a test of its own.
                'val_cfg': None,
                'val_dataloader': None,
                'val_evaluator': None,
                'model.backbone.base_channels': 8,
                'model.backbone.drop_path_rate': 0.3,
                **options,
            }
        )
        from mmkw.engine.command_line import build_runner

        config.launcher = 'none'
        config.work_dir = str(tmp_path / name)
        config.experiment_name = f'{tmp_path.name}-{name}-{len(hooks)}-{config.get("resume")}'
        runner = build_runner(config)
        for hook in hooks:
            runner.register_hook(hook)
        return runner

    return make


@pytest.mark.parametrize('segmentation', [False, True])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(demo, segmentation):
    if segmentation:
        pytest.importorskip('mmseg', reason='trains a segmentor')
    whole = demo('whole', segmentation=segmentation)
    whole.train()
    interrupted = demo('parts', Interrupt(), segmentation=segmentation)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    rest = demo('parts', segmentation=segmentation, resume=True, load_from=None)
    rest.train()
    assert whole.iter == rest.iter == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    optimizers = [r.optim_wrapper.optimizer.state_dict()['state'] for r in (whole, rest)]
    for states in zip(*(o.values() for o in optimizers)):
        assert torch.equal(states[0]['exp_avg'], states[1]['exp_avg'])


def test_moving_average_of_the_weights(demo):
    runner = demo('ema')
    runner.register_hook(dict(type='EMAHook', momentum=0.5))
    runner.train()
    hook = next(h for h in runner._hooks if type(h).__name__ == 'EMAHook')
    network, average = runner.model.backbone, hook.ema_model.module.backbone
    cells = average.layer1[0].conv1.cells
    assert cells is average.warehouse_manager.weights[0]
    assert not torch.equal(cells, network.warehouse_manager.weights[0])
    x = torch.randn(1, 3, 64, 64)
    runner.model.eval()
    hook.ema_model.eval()
    with torch.no_grad():
        averaged, current = average(x)[-1], network(x)[-1]
        assert not torch.equal(averaged, current)
        # During the evaluation the two models exchange their weights.
        hook._swap_ema_parameters()
        assert torch.equal(network(x)[-1], averaged) and torch.equal(average(x)[-1], current)


def in_two_processes(work, path, *arguments):
    """What process 0 saves."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(path), *arguments), nprocs=2)
    return torch.load(path)


@pytest.mark.filterwarnings('ignore')
def test_parameters_may_be_sharded_with_their_layers(tmp_path):
    found = in_two_processes(work_sharded, tmp_path / 'results.pth')
    for kind in SHARDED:
        for dynamic in (False, True):
            assert found[kind, dynamic] == pytest.approx(found['DDP', dynamic], rel=1e-5)
    for kind in REFUSED:
        assert found[kind, False] == pytest.approx(found['DDP', False], rel=1e-5)
        assert 'wrap the module that has warehouse_manager' in found[kind, True]


WAYS = [(with_cp, tau) for with_cp in (False, True) for tau in (0, 1)]


@pytest.fixture(scope='module')
def averaged_gradients(tmp_path_factory):
    """Of every way, averaged over the two processes."""
    return in_two_processes(work, tmp_path_factory.mktemp('two') / 'results.pth', WAYS)


@pytest.mark.parametrize('with_cp, tau', WAYS)
def test_averaged_gradients_of_two_processes_equal_those_of_the_joined_batch(
    averaged_gradients, with_cp, tau
):
    averaged = averaged_gradients[with_cp, tau]
    network = make_network(with_cp=False, tau=tau)
    loss_of(network, images()).backward()
    expected = gradients(network)
    assert set(averaged) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(averaged[name], gradient, rtol=1e-4, atol=1e-6)


def test_amp_step_in_bfloat16(root):
    from configs_util import build_model, detection_batch

    config = Config.fromfile(root / 'configs/demo/mask-rcnn_kw1x-r18_fpn_annealed_mini-coco.py')
    model = build_model(config)
    model.train()
    data = model.data_preprocessor(detection_batch(size=64), True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        features = model.backbone(data['inputs'])
    assert features[0].dtype == torch.bfloat16
    sum(f.float().square().mean() for f in features).backward()
    used = dict(model.backbone.named_parameters())
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in used.values())
