"""The study pairs runs by seed, reports all that ended, and makes only what is missing."""

import importlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPERS

from mmkw import KWConv2d, is_converted
from mmkw.engine.building import build_model

# What may not be the same in two runs.
SAME = ('task', 'split', 'source epochs', 'epochs', 'options', 'seed', 'source')


@pytest.fixture
def study(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools/benchmarks'))
    return importlib.import_module('study')


@pytest.fixture
def table(study):
    arms = {'static': study.Arm(), 'KW 1x': study.Arm(1, {'a.b': 2})}
    return study.Table(arms, seeds=(0, 1, 2), epochs=3, task='digits', split='val', source=6)


@pytest.fixture
def run_of(study, table):
    """Makes the record of a run of one of the arms."""
    return partial(record, study, table)


def record(study, table, arm, seed, box, mask=30.0, seconds=1.0, source='a', processor='one'):
    return {
        **study.identity(table.arms[arm], table),
        'seed': seed,
        'source': source,
        'box AP': box,
        'mask AP': mask,
        'steps': 900,
        'seconds a step': seconds,
        'parameters': 1_500_000,
        'processor': processor,
        'validation': [[box - 1, mask - 1], [box, mask]],
    }


def test_gains_are_taken_seed_by_seed(study, table, run_of):
    """The seeds differ by more than the networks: only pairs show the gain."""
    pytest.importorskip('scipy')
    runs = [run_of('static', seed, box) for seed, box in enumerate((40.0, 44.0, 48.0))]
    runs += [run_of('KW 1x', seed, box, 31.0, 1.2) for seed, box in enumerate((41.0, 45.2, 48.9))]
    # Networks that started elsewhere say nothing about these.
    runs += [run_of(arm, 0, 54.0, source='b') for arm in ('static', 'KW 1x')]
    static, dynamic = study.report(table, runs).splitlines()[2:]
    assert static == '| static (3) | 44.0 ± 4.0 | 30.0 ± 0.0 |  |  |  |  |  | 1.50 |'
    name, box, mask, gain, _, p_box, p_mask, ratio, _ = dynamic.strip('| ').split(' | ')
    assert (name, box, mask) == ('KW 1x (3)', '45.0 ± 4.0', '31.0 ± 0.0')
    assert (gain, ratio) == ('+1.0 ± 0.2', '1.20')
    # scipy's paired t-test of 1.0, 1.2, 0.9, and of 1, 1, 1.
    assert (p_box, p_mask) == ('0.007', '< 0.001')


def test_times_are_compared_on_one_kind_of_processor(study, table, run_of, tmp_path):
    """A gain is the networks', wherever they were trained; a time is the processor's, too."""
    pytest.importorskip('scipy')
    pytest.importorskip('matplotlib')
    runs = [run_of('static', seed, 40.0 + seed, seconds=1.0) for seed in (0, 1)]
    runs += [run_of('KW 1x', 0, 41.0, seconds=1.5)]
    runs += [run_of('KW 1x', 1, 42.5, seconds=0.3, processor='other')]
    cells = study.report(table, runs).splitlines()[3].split(' | ')
    assert cells[3].startswith('+1.2') and cells[-2] == '1.50'
    assert study.hours(runs) == pytest.approx(900 * 3.8 / 3600)
    elsewhere = [{**run, 'processor': 'other'} if run['options'] else run for run in runs]
    assert study.report(table, elsewhere).splitlines()[3].split(' | ')[-2] == ''
    for name, some in (('paired', runs), ('elsewhere', elsewhere)):
        study.draw(table, some, tmp_path / f'{name}.png')
        assert (tmp_path / f'{name}.png').exists()


def test_a_study_that_has_not_ended_reports_what_it_has(study, table, run_of):
    pytest.importorskip('scipy')
    lines = study.report(table, [run_of('KW 1x', 2, 41.0)]).splitlines()
    assert lines[2:] == ['| KW 1x (1) | 41.0 | 30.0 |  |  |  |  |  | 1.50 |']


def test_what_is_there_is_not_made_again(study, table, run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'RESULTS', tmp_path / 'runs.json')
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    monkeypatch.setitem(study.TABLES, 'some', table)
    with pytest.raises(SystemExit, match=r'data/mini_coco is missing\. Run: python tools/dataset'):
        study.Study('some', 1).make()
    (tmp_path / 'data/mini_coco').mkdir(parents=True)
    runs = [run_of(arm, seed, 40.0) for arm in table.arms for seed in (0, 1)]
    # With another source it is another run.
    runs.append(run_of('static', 2, 40.0, source='b'))
    # So it is after more epochs, and with another option.
    longer = replace(table, epochs=4)
    runs += [record(study, longer, 'static', 2, 40.0), {**runs[0], 'seed': 2, 'options': {'c': 1}}]
    (tmp_path / 'runs.json').write_text(json.dumps(runs))
    made, trained = [], []
    monkeypatch.setattr(study.Study, 'add', lambda self, *run: made.append(run))
    monkeypatch.setattr(study.Study, 'train', lambda self, *source: trained.append(source))
    monkeypatch.setattr(study, 'digest', lambda checkpoint: 'a')
    study.Study('some', 2).make()
    assert sorted(made) == [('KW 1x', 2), ('static', 2)]
    assert trained == [('work_dirs/study/digits_6_epochs', 6, {}, 0)]
    # What one table made serves another.
    names = {'first': table.arms['KW 1x'], 'second': study.Arm(4)}
    monkeypatch.setitem(study.TABLES, 'other', replace(table, arms=names, seeds=(0,)))
    study.Study('other', 2).make()
    assert made[2:] == [('second', 0)]


def test_a_source_is_known_by_its_weights(study, tmp_path):
    state = dict(a=torch.zeros(2), b=torch.zeros(3))
    torch.save(dict(state_dict=state, meta=dict(time=1)), tmp_path / 'a.pth')
    torch.save(dict(state_dict=state, meta=dict(time=2)), tmp_path / 'b.pth')
    state['b'][1] = 1e-6
    torch.save(dict(state_dict=state), tmp_path / 'c.pth')
    first, same, other = (study.digest(tmp_path / f'{name}.pth') for name in 'abc')
    assert first == same != other


def test_arms_differ_by_their_overrides_alone(study, table):
    task = study.TASKS['digits']
    assert table.arms['static'].overrides(task) == {}
    expected = {'model.backbone.type': 'mmkw.KWResNet', 'model.backbone.cell_num_ratio': 1}
    assert table.arms['KW 1x'].overrides(task) == {**expected, 'a.b': 2}
    shorter = replace(table.arms['KW 1x'], epochs=2)
    kinds = [study.identity(arm, table) for arm in (table.arms['KW 1x'], shorter)]
    assert kinds == [{**kinds[1], 'epochs': 3}, {**kinds[0], 'epochs': 2}]


def test_every_table_of_the_project_can_be_made(study, root):
    """Its overrides are those of its config, and its results are where they belong."""
    from mmengine.config import Config

    pytest.importorskip('mmdet', reason='the config inherits from its own')
    for name, table in study.TABLES.items():
        config = Config.fromfile(root / study.Study(name, 1).config)
        for kind, arm in table.arms.items():
            changed = config.copy()
            changed.merge_from_dict(arm.overrides(study.TASKS[table.task]))
            assert changed.model.backbone.type.startswith('mmkw.KW') == ('static' not in kind)
            # A network that is wrapped is the static one.
            wrapped = changed.model.backbone.get('module', config.model.backbone)
            same = [json.dumps(c, sort_keys=True) for c in (wrapped, config.model.backbone)]
            assert same[0] == same[1]
        assert len(table.seeds) >= 3
        # What confirms a choice is not what the choice looked at.
        assert (table.split == 'test') == (min(table.seeds) > 2)
    runs = json.loads(study.RESULTS.read_text())
    asked = [(arm, table) for table in study.TABLES.values() for arm in table.arms.values()]
    assert all(any(study.runs_of(*arm, [run]) for arm in asked) for run in runs)
    places = [json.dumps([run[k] for k in run if k in SAME]) for run in runs]
    assert len(set(places)) == len(places)


TASKS = [
    'digits',
    'digits, half as wide',
    'conditions, half as wide',
    'stamps from ImageNet',
    'segmentation under conditions, half as wide',
]


@pytest.mark.parametrize('name', TASKS)
def test_every_task_has_its_schedule_and_its_test_split(study, root, name):
    """The dynamic network is made of the static one's config, which then is another no more."""
    from mmengine.config import Config

    task = study.TASKS[name]
    pytest.importorskip('mmseg' if task.epoch else 'mmdet', reason='the config inherits from it')
    for package in ('mmpretrain', 'timm') if 'ImageNet' in name else ():
        pytest.importorskip(package, reason='has the network')
    configs = []
    for budget in (None, 2):
        config = Config.fromfile(root / f'configs/demo/{task.config}.py')
        options = {**task.schedule(2), **study.Arm(budget).overrides(task), **task.on_test()}
        config.merge_from_dict(options)
        length, end = ('max_iters', 300) if task.epoch else ('max_epochs', 2)
        assert config.train_cfg[length] == config.param_scheduler[1].end == end
        prefix = config.test_dataloader.dataset.data_prefix
        assert set(prefix.values()) <= {'test', 'test/', 'foreground/test'}
        assert is_converted(build_model(config, on_meta=True).backbone) == (budget is not None)
        configs.append({k: v for k, v in config.items() if k != 'model'})
    assert configs[0] == configs[1]


@pytest.mark.exhaustive
def test_a_study_from_the_source_to_the_test_split(study, table, few_images, monkeypatch):
    for package in ('mmdet', 'scipy', 'matplotlib'):
        pytest.importorskip(package)
    results = few_images / 'docs/evidence/runs.json'
    monkeypatch.setattr(study, 'ROOT', few_images)
    monkeypatch.setattr(study, 'RESULTS', results)
    arms = {'static': study.STATIC, 'KW 1x': study.CHOSEN}
    short = replace(table, arms=arms, seeds=(3,), epochs=1, source=1, split='test')
    monkeypatch.setitem(study.TABLES, 'short', short)
    monkeypatch.setattr('sys.argv', ['study.py', 'short', '--jobs', '1'])
    study.main()
    runs = json.loads(results.read_text())
    assert [(run['seed'], run['split'], run['steps']) for run in runs] == [(3, 'test', 2)] * 2
    assert results.with_name('short.png').exists()
    tested = list(few_images.glob('work_dirs/study/*/seed3/test'))
    assert len(tested) == 2
    for folder in tested:
        assert 'instances_test.json' in (folder / 'config.py').read_text()
        # Nine images, eight at a time.
        assert 'Epoch(test) [2/2]' in (folder / 'test.py.log').read_text()


def test_pictures_show_what_ended(study, table, run_of, tmp_path):
    pytest.importorskip('matplotlib')
    curve = {'steps': 900, 'validation': [[30.0, 20.0], [40.0, 30.0], [44.0, 31.0]]}
    runs = [{**run_of(arm, seed, 44.0), **curve} for arm in table.arms for seed in (0, 1)]
    for some in (runs[:1], runs):
        study.draw(table, some, tmp_path / 'a.png')
        assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_bfloat16_is_of_the_passes_alone(root, monkeypatch):
    """Weights and their steps are of float32, of both networks."""
    monkeypatch.syspath_prepend(root / 'tools')
    importlib.import_module('benchmarks.cpu_autocast')
    for network in (torch.nn.Conv2d(8, 8, 3), KWConv2d(8, 8, 3)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        wrapper = OPTIM_WRAPPERS.build(dict(type='CPUAutocastOptimWrapper', optimizer=optimizer))
        before = network.bias.detach().clone()
        with wrapper.optim_context(network):
            y = network(torch.randn(2, 8, 6, 6))
        assert y.dtype == torch.bfloat16
        wrapper.update_params(y.float().square().mean())
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not torch.equal(network.bias, before)


def test_two_studies_at_once_lose_no_run(study, monkeypatch, tmp_path):
    """Each began before the other wrote a run."""
    monkeypatch.setattr(study, 'RESULTS', tmp_path / 'evidence' / 'runs.json')
    monkeypatch.setattr(study, 'parameters', lambda checkpoint: 1)
    lines = '{"time": 1, "loss": 1, "step": 9}\n{"coco/bbox_mAP": 0.4, "coco/segm_mAP": 0.3}'
    (tmp_path / 'scalars.json').write_text(lines)
    monkeypatch.setattr(study, 'latest', lambda folder, pattern: tmp_path / 'scalars.json')
    monkeypatch.setattr(study.Study, 'train', lambda self, *_: tmp_path / 'last.pth')
    studies = study.Study('rates', 1), study.Study('scratch', 1)
    for one, arm in zip(studies, ('static, 1e-3', 'static')):
        one.add(arm, 0)
    assert [run['task'] for run in study.written()] == ['digits', 'digits']
    assert [len(one.runs) for one in studies] == [1, 2]
    # Nor is one written twice that two tables have in common.
    study.Study('rates', 1).add('static, 1e-3', 0)
    studies[0].add('static, 1e-3', 1)
    assert [run['seed'] for run in study.written()] == [0, 0, 1]
    assert [path.name for path in study.RESULTS.parent.iterdir()] == ['runs.json']


def test_a_stop_while_a_run_is_written_leaves_the_others(study, monkeypatch, tmp_path):
    monkeypatch.setattr(study, 'RESULTS', tmp_path / 'runs.json')
    runs = [dict.fromkeys(study.WHAT, 0) | {'seed': seed} for seed in range(3)]
    study.write(runs[0])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(study.Path, 'replace', stop)
        with pytest.raises(KeyboardInterrupt):
            study.write(runs[1])
    assert study.written() == runs[:1]
    assert study.write(runs[2]) == [runs[0], runs[2]] == study.written()
