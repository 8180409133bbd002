"""The demos run to their end, here with a few images and one epoch."""

import importlib.util
from dataclasses import replace

import pytest

from mmkw import read_checkpoint

pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_static_and_dynamic_go_on_from_one_network(tree, monkeypatch, capsys, task):
    spec = importlib.util.spec_from_file_location('demo', tree / 'tools/demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    learnt, *names = demo.DEMOS[task]
    if learnt.epoch:
        # The rate begins to fall after 50 iterations. So many at the demo's own would go far.
        learnt = replace(learnt, epoch=51)
        monkeypatch.setattr(demo, 'FASTER', {'optim_wrapper.optimizer.lr': 1e-3})
    monkeypatch.setitem(demo.IMAGES, learnt.data, '--train 8 --val 2 --test 2')
    monkeypatch.setattr(demo, 'ROOT', tree)
    monkeypatch.setattr(demo, 'FIRST', 1)
    monkeypatch.setattr(demo, 'FURTHER', 1)
    monkeypatch.setattr('study.ROOT', tree)
    demo.show(learnt, *names)
    *_, table = capsys.readouterr().out.split('held-out images: ')
    metrics, *rows = table.splitlines()
    assert metrics.split(', ') == list(learnt.metrics)
    titles = [
        'static, 1 epochs',
        'static, 1 epochs from there',
        'KernelWarehouse 1x, 1 epochs from there',
    ]
    for title, row in zip(titles, rows):
        values = row.removeprefix(f'  {title} ').split()
        assert len(values) == len(learnt.metrics) and all(0 <= float(v) <= 100 for v in values)
    folder = names[2]
    start, static, dynamic = (
        read_checkpoint(str(tree / f'{folder}{suffix}' / learnt.last(1)))['state_dict']
        for suffix in ('-start', '-static', '')
    )
    assert set(start) == set(static)
    assert any('warehouse' in name for name in dynamic)
    # A few steps at a small rate leave weights near those they started from.
    for name in ('backbone.conv1.weight', 'backbone.layer1.0.conv1.weight'):
        assert (static[name] - start[name]).norm() < 0.3 * start[name].norm()
    assert (tree / folder / 'pictures').exists()
