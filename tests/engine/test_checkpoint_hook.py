"""Every interrupted run goes on: dynamic and static, from whatever an interruption left behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import interruptions
import pytest
import torch
from interruptions import Noise, make_runner, result
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmkw.checkpoints import DamagedCheckpointError, read_checkpoint
from mmkw.engine.files.backend import WholeFileBackend

BOTH = pytest.mark.parametrize('dynamic', [True, False], ids=['dynamic', 'static'])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """By kind of network, a folder with three epochs, and the result of four without a break."""
    made = {}
    for dynamic in (True, False):
        folder = tmp_path_factory.mktemp('trained')
        make_runner(folder / 'three', dynamic, epochs=3).train()
        make_runner(folder / 'four', dynamic, epochs=4).train()
        made[dynamic] = folder / 'three', result(folder / 'four', 4)
    return made


def copied(source, folder):
    """A copy whose pointer names the copy's last checkpoint."""
    shutil.copytree(source, folder)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_3.pth'))
    return folder


def remove(folder):
    (folder / 'last_checkpoint').unlink()


def half_write(folder, name='epoch_3.pth'):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def flip(folder):
    content = bytearray((folder / 'epoch_3.pth').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'epoch_3.pth').write_bytes(content)


def point(content):
    return lambda folder: (folder / 'last_checkpoint').write_bytes(content)


LEFT = {
    'no pointer': (remove, 'epoch_3.pth, since: .*last_checkpoint is missing or empty'),
    'an empty pointer': (point(b''), 'epoch_3.pth, since: .*is missing or empty'),
    'a pointer of spaces': (point(b' \n'), 'epoch_3.pth, since: .*is missing or empty'),
    'a pointer of no text': (point(b'\xff\x00'), 'epoch_3.pth, since: .*is missing or empty'),
    'a pointer to nothing': (
        point(b'gone/epoch_2.pth'),
        'epoch_2.pth, since: gone/epoch_2.pth, which last_checkpoint names, does not exist',
    ),
    'a pointer to a later one': (point(b'gone/epoch_9.pth'), 'epoch_3.pth, since: gone/epoch_9'),
    'a half-written checkpoint': (half_write, 'epoch_2.pth, since: .*epoch_3.pth is damaged'),
    'an empty checkpoint': (
        lambda folder: (folder / 'epoch_3.pth').write_bytes(b''),
        'epoch_2.pth, since: .*epoch_3.pth is empty',
    ),
    'a flipped bit': (flip, 'epoch_2.pth, since: .*epoch_3.pth is damaged'),
    'the first one only': (
        lambda folder: (half_write(folder), half_write(folder, 'epoch_2.pth')),
        'epoch_1.pth, since: .*epoch_2.pth is damaged',
    ),
}


@BOTH
@pytest.mark.parametrize('left', LEFT)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, trained, dynamic, left):
    source, expected = trained[dynamic]
    folder = copied(source, tmp_path / 'run')
    damage, message = LEFT[left]
    damage(folder)
    make_runner(folder, dynamic, epochs=4).train()
    log = ''.join(path.read_text() for path in folder.glob('*/*.log'))
    assert re.search(f'Resuming from {folder}/{message}', log), log
    assert all(map(torch.equal, result(folder, 4), expected))


@BOTH
def test_checkpoints_may_be_placed_in_the_work_folder_by_its_name(tmp_path, trained, dynamic):
    source, expected = trained[dynamic]
    folder = copied(source, tmp_path / 'run')
    remove(folder)
    make_runner(folder, dynamic, epochs=4, out_dir=str(folder)).train()
    log = ''.join(path.read_text() for path in folder.glob('*/*.log'))
    assert f'Resuming from {folder}/epoch_3.pth' in log
    assert all(map(torch.equal, result(folder, 4), expected))


@BOTH
def test_a_folder_that_was_moved_goes_on(tmp_path, trained, dynamic):
    source, expected = trained[dynamic]
    copied(source, tmp_path / 'old').rename(tmp_path / 'new')
    make_runner(tmp_path / 'new', dynamic, epochs=4).train()
    log = ''.join(path.read_text() for path in tmp_path.glob('new/*/*.log'))
    assert f'Resuming from {tmp_path}/new/epoch_3.pth' in log
    assert all(map(torch.equal, result(tmp_path / 'new', 4), expected))


@BOTH
def test_a_whole_pointer_is_followed_wherever_it_points(tmp_path, trained, dynamic):
    source, expected = trained[dynamic]
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'last_checkpoint').write_text(str(source / 'epoch_2.pth'))
    make_runner(folder, dynamic, epochs=4).train()
    log = ''.join(path.read_text() for path in folder.glob('*/*.log'))
    assert 'resumed epoch: 2' in log and 'Resuming from' not in log
    assert all(map(torch.equal, result(folder, 4), expected))


@BOTH
@pytest.mark.parametrize('resume', [True, False])
def test_where_nothing_was_saved_yet_it_starts_from_the_weights_it_began_with(
    tmp_path, trained, dynamic, resume
):
    path = trained[dynamic][0] / 'epoch_3.pth'
    weights = read_checkpoint(path)['state_dict']
    for folder, epochs in ((tmp_path / 'run', 1), (tmp_path / 'run', 2)):
        runner = make_runner(folder, dynamic, epochs=epochs, start_from=str(path))
        runner._resume = resume
        started = []
        runner.register_hook(Started(started), priority='LOWEST')
        runner.train()
        # The second time there is a checkpoint, which goes before.
        begun_anew = all(torch.equal(started[0][name], weights[name]) for name in weights)
        assert begun_anew == (epochs == 1 or not resume) and runner.epoch == epochs


class Started(Hook):
    """Keeps the weights at the first step."""

    def __init__(self, kept):
        self.kept = kept

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.kept:
            state = runner.model.state_dict()
            self.kept.append({name: value.clone() for name, value in state.items()})


@BOTH
def test_where_nothing_is_whole_the_run_stops_and_nothing_is_lost(tmp_path, trained, dynamic):
    folder = copied(trained[dynamic][0], tmp_path / 'run')
    for name in ('epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'):
        half_write(folder, name)
    before = {path: path.read_bytes() for path in folder.glob('*.pth')}
    runner = make_runner(folder, dynamic, epochs=4)
    with pytest.raises(DamagedCheckpointError, match=r'No whole checkpoint.*Remove these files'):
        runner.train()
    assert {path: path.read_bytes() for path in folder.glob('*.pth')} == before


@BOTH
def test_where_nothing_is_the_run_begins_and_says_so(tmp_path, dynamic):
    make_runner(tmp_path, dynamic, epochs=1).train()
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert f'No checkpoint in {tmp_path}: starting at the beginning.' in log


def altered(path, **info):
    """Writes other information into a checkpoint."""
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['message_hub']['runtime_info'].update(info)
    torch.save(checkpoint, path)


def hook_of(runner):
    (hook,) = [hook for hook in runner.hooks if hasattr(hook, 'best_ckpt_path')]
    return hook


@BOTH
@pytest.mark.parametrize('named', [True, False], ids=['named', 'imported'])
def test_a_resumed_checkpoint_removes_nothing_else(tmp_path, trained, dynamic, named):
    """MMEngine removes the best checkpoint, and those to keep, that a resumed one names."""
    from mmengine.hooks import CheckpointHook

    folder = copied(trained[dynamic][0], tmp_path / 'run')
    victims = [tmp_path / 'best_acc_epoch_7.pth', tmp_path / 'best_models/deep.txt']
    victims += [folder / 'best_models/deep.txt', folder / 'best_notes.txt', folder / 'epoch_99.pth']
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text('dear')
    kind = 'CheckpointHook' if named else CheckpointHook
    for best in (*victims, victims[1].parent, victims[2].parent, '../best_acc_epoch_7.pth', 5):
        best = best if isinstance(best, int) else str(best)
        altered(folder / 'epoch_3.pth', best_ckpt=best, best_score=0.0)
        runner = make_runner(folder, dynamic, epochs=3, save_best='acc', rule='greater', type=kind)
        runner.train()
        hook_of(runner)._save_best_checkpoint(runner, dict(acc=1.0))
        assert all(victim.read_text() == 'dear' for victim in victims)


@BOTH
@pytest.mark.parametrize('kept', [[1, 70, 71], [3, 5, 6, 99], [3, 3], [-1, 3], ['../x'], 5, None])
def test_a_resumed_checkpoint_names_no_files_to_keep_that_are_not_there(
    tmp_path, trained, dynamic, kept
):
    folder = copied(trained[dynamic][0], tmp_path / 'run')
    altered(folder / 'epoch_3.pth', keep_ckpt_ids=kept)
    before = sorted(path.name for path in folder.glob('*.pth'))
    runner = make_runner(folder, dynamic, kept=2, epochs=4)
    runner.train()
    assert sorted(path.name for path in folder.glob('*.pth')) == [*before, 'epoch_4.pth']


@BOTH
def test_the_best_checkpoint_is_replaced_also_in_a_moved_folder(tmp_path, dynamic):
    options = dict(save_best='acc', rule='greater')
    runner = make_runner(tmp_path / 'old', dynamic, epochs=1, **options)
    runner.train()
    hook_of(runner)._save_best_checkpoint(runner, dict(acc=1.0))
    (tmp_path / 'old').rename(tmp_path / 'new')
    runner = make_runner(tmp_path / 'new', dynamic, epochs=2, **options)
    runner.train()
    hook_of(runner)._save_best_checkpoint(runner, dict(acc=2.0))
    assert [path.name for path in (tmp_path / 'new').glob('best_*')] == ['best_acc_epoch_2.pth']


@BOTH
def test_the_best_score_may_be_a_tensor_and_the_path_relative(tmp_path, dynamic, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(save_best='acc', rule='greater')
    runner = make_runner('run', dynamic, epochs=1, **options)
    runner.train()
    hook_of(runner)._save_best_checkpoint(runner, dict(acc=torch.tensor(1.0)))
    runner.save_checkpoint('run', 'epoch_1.pth')
    for score, best in ((0.5, 1), (2.0, 2)):
        runner = make_runner('run', dynamic, epochs=2, **options)
        runner._load_from = 'run/epoch_1.pth'
        runner.train()
        hook_of(runner)._save_best_checkpoint(runner, dict(acc=torch.tensor(score)))
        found = [path.name for path in (tmp_path / 'run').glob('best_*')]
        assert found == [f'best_acc_epoch_{best}.pth']


@BOTH
def test_a_scheduler_with_a_function_resumes(tmp_path, dynamic):
    """Its checkpoints are data all the same."""
    steps = dict(type='OneCycleLR', eta_max=0.1, total_steps=9, end=9, by_epoch=False)
    make_runner(tmp_path / 'whole', dynamic, epochs=3, scheduler=steps).train()
    for epochs in (2, 3):
        make_runner(tmp_path / 'parts', dynamic, epochs=epochs, scheduler=steps).train()
    assert all(map(torch.equal, result(tmp_path / 'parts', 3), result(tmp_path / 'whole', 3)))


@BOTH
def test_the_classes_of_a_config_are_data(tmp_path, dynamic, monkeypatch):
    known = ConfigDict(classes=('a',), skeleton=dict(a=[dict(b=1)]))
    monkeypatch.setattr(Noise, 'metainfo', known, raising=False)
    make_runner(tmp_path, dynamic, epochs=1).train()
    meta = read_checkpoint(tmp_path / 'epoch_1.pth')['meta']
    assert meta['dataset_meta'] == dict(classes=('a',), skeleton=dict(a=[dict(b=1)]))
    # As MMEngine's own hook leaves them.
    torch.save(dict(meta=dict(dataset_meta=known), state_dict={}), tmp_path / 'theirs.pth')
    theirs = read_checkpoint(tmp_path / 'theirs.pth')['meta']['dataset_meta']
    assert theirs == meta['dataset_meta'] and type(theirs['skeleton']) is dict


@pytest.mark.parametrize('template', ['e{:03d}.pth', '{}.pth', 'a{0}b.pth'])
def test_names_of_another_template(tmp_path, template):
    make_runner(tmp_path, False, kept=1, epochs=2, filename_tmpl=template).train()
    (tmp_path / 'last_checkpoint').unlink()
    make_runner(tmp_path, False, kept=1, epochs=3, filename_tmpl=template).train()
    assert [path.name for path in tmp_path.glob('*.pth')] == [template.format(3)]
    log = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'resumed epoch: 2' in log


FIELDS = {
    'meta': None,
    'meta.epoch': '3',
    'meta.iter': [9],
    'meta.seed': -1,
    'message_hub': [],
    'message_hub.log_scalars': {1: 2},
    'message_hub.runtime_info': None,
    'optimizer': None,
    'param_schedulers': [dict(step='x')],
    'ema_state_dict': [],
}


@BOTH
@pytest.mark.parametrize('field', FIELDS)
def test_a_field_of_the_wrong_kind_is_named_before_anything_is_resumed(
    tmp_path, trained, dynamic, field
):
    folder = copied(trained[dynamic][0], tmp_path / 'run')
    checkpoint = torch.load(folder / 'epoch_3.pth', weights_only=False)
    *parents, key = field.split('.')
    holder = checkpoint
    for parent in parents:
        holder = holder[parent]
    holder[key] = FIELDS[field]
    torch.save(checkpoint, folder / 'epoch_3.pth')
    with pytest.raises(DamagedCheckpointError, match=rf'epoch_3\.pth holds {field}, which is not'):
        make_runner(folder, dynamic, epochs=4).train()


def test_a_resumed_seed_is_that_of_its_run_only(tmp_path, trained):
    """MMEngine writes it into the default of an argument that all runners share."""
    import inspect

    from mmengine.runner import Runner

    before = dict(inspect.signature(Runner).parameters['randomness'].default)
    runner = make_runner(copied(trained[False][0], tmp_path / 'run'), False, epochs=4)
    runner._randomness_cfg = inspect.signature(Runner).parameters['randomness'].default
    runner.train()
    assert inspect.signature(Runner).parameters['randomness'].default == before


@pytest.mark.parametrize('kept', [0, -1])
def test_all_checkpoints_may_be_kept(tmp_path, kept):
    make_runner(tmp_path, False, kept=kept, epochs=3).train()
    assert len(list(tmp_path.glob('epoch_*.pth'))) == 3


def test_links_are_not_written_through(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('dear')
    (tmp_path / 'a.pth.part').symlink_to(victim)
    WholeFileBackend().put(b'content', tmp_path / 'a.pth')
    assert victim.read_text() == 'dear' and not (tmp_path / 'a.pth').is_symlink()


def test_a_folder_in_the_place_of_the_pointer(tmp_path, trained):
    folder = copied(trained[False][0], tmp_path / 'run')
    (folder / 'last_checkpoint').unlink()
    (folder / 'last_checkpoint').mkdir()
    with pytest.raises(OSError, match=r'last_checkpoint of .* could not be written'):
        make_runner(folder, False, epochs=4).train()
    log = ''.join(path.read_text() for path in folder.glob('*/*.log'))
    assert 'Resuming from' in log and (folder / 'epoch_4.pth').exists()


def test_the_hook_stands_in_every_config():
    """Under MMEngine's name, so that no config has to change."""
    hook = HOOKS.build(dict(type='CheckpointHook', interval=2))
    assert type(hook).__module__ == 'mmkw.engine.files.hook' and hook.interval == 2


def test_a_file_is_whole_or_not_there(tmp_path):
    backend, path = WholeFileBackend(), tmp_path / 'a/b.pth'
    backend.put(b'first', path)
    assert path.read_bytes() == b'first'
    # A folder stands where the unfinished file would: nothing can be written.
    (tmp_path / 'a/b.pth.part').mkdir()
    with pytest.raises(OSError, match=r'could not be written.*Earlier checkpoints are untouched'):
        backend.put(b'second', path)
    assert path.read_bytes() == b'first'


@BOTH
def test_a_full_disk_loses_the_file_being_written_only(tmp_path, trained, dynamic, full_disk):
    source, expected = trained[dynamic]
    folder = copied(source, tmp_path / 'run')
    runner = make_runner(folder, dynamic, kept=1, epochs=4)
    message = r'epoch_4\.pth of .* MB could not be written.*--resume'
    with full_disk(), pytest.raises(OSError, match=message):
        runner.train()
    assert not list(folder.glob('*.part')) and not (folder / 'epoch_4.pth').exists()
    assert Path((folder / 'last_checkpoint').read_text()) == folder / 'epoch_3.pth'
    read_checkpoint(folder / 'epoch_3.pth')
    make_runner(folder, dynamic, epochs=4).train()
    assert all(map(torch.equal, result(folder, 4), expected))


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """To the bit, with one and with two kept files; ``--kills 50`` takes a minute."""
    # A process that has not trained yet and can fork.
    command = [sys.executable, interruptions.__file__, str(tmp_path), '--kills', '12']
    outcome = subprocess.run(command, capture_output=True, text=True)
    log = (tmp_path / 'log.txt').read_text()[-3000:]
    assert outcome.returncode == 0, f'{outcome.stderr}\n{log}'
    counts = json.loads(outcome.stdout.splitlines()[-1])
    assert counts['kills'] >= 12 and counts['at_files'] >= 5 and counts['within_writes'] >= 1


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return {'images': len(results)}


@BOTH
@pytest.mark.parametrize('loop', ['val', 'test'])
def test_a_run_that_only_evaluates(tmp_path, dynamic, loop):
    """The hook has prepared nothing then: it does that before training."""
    loader = dict(
        dataset=interruptions.Noise(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        batch_size=2,
        num_workers=0,
        collate_fn=dict(type='pseudo_collate'),
    )
    parts = {
        f'{loop}_dataloader': loader,
        f'{loop}_cfg': {},
        f'{loop}_evaluator': Evaluator([Count()]),
    }
    model = interruptions.Model(dynamic)
    parts['default_hooks'] = dict(checkpoint=dict(type='CheckpointHook'))
    parts['custom_hooks'] = [dict(type='mmkw.IterationSeedHook')]
    if dynamic:
        parts['custom_hooks'].append(dict(type='mmkw.TemperatureHook', length=2))
    runner = Runner(model, work_dir=str(tmp_path), **parts)
    assert getattr(runner, loop)() == {'images': 3}
