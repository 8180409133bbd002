"""MMEngine's checkpoints load safely; foreign code is refused without being run."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmkw.checkpoints import DamagedCheckpointError, UnsafeCheckpointError, load_from_local

needs_safe_loading = pytest.mark.skipif(
    not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'),
    reason='needs torch >= 2.6',
)


class Attack:
    """Would make a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class GetattrAttack:
    """Would reach a function through the attributes of an allowed class."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@needs_safe_loading
def test_the_records_of_mmengine_load(tmp_path):
    buffer = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        buffer.update(value)
    checkpoint = dict(
        state_dict=dict(w=torch.ones(2)),
        message_hub=dict(
            log_scalars=dict(loss=buffer),
            runtime_info=dict(
                array=np.arange(3), number=np.float64(2.5), text='a', flag=np.bool_(1)
            ),
        ),
    )
    torch.save(checkpoint, tmp_path / 'a.pth')
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))
    history = loaded['message_hub']['log_scalars']['loss']
    assert (history.mean(), history.current(), history.max()) == (3.0, 6.0, 6.0)
    info = loaded['message_hub']['runtime_info']
    assert info['array'].tolist() == [0, 1, 2] and info['number'] == 2.5 and info['text'] == 'a'


@needs_safe_loading
@pytest.mark.parametrize('legacy', [False, True])
def test_foreign_code_is_refused_and_not_run(tmp_path, legacy):
    path, made = tmp_path / 'attack.pth', tmp_path / 'made'
    checkpoint = dict(state_dict=dict(w=torch.ones(2)), extra=Attack(made))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    named = 'of unknown type' if legacy else r'posix\.mkdir|nt\.mkdir'
    with pytest.raises(UnsafeCheckpointError, match=f'attack.pth holds .*({named})') as error:
        load_checkpoint(nn.Linear(1, 1), str(path))
    assert not made.exists()
    assert 'If you trust its source' in str(error.value)


@needs_safe_loading
def test_getattr_is_allowed_for_the_statistics_only(tmp_path):
    torch.save(dict(a=GetattrAttack()), tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError):
        load_from_local(str(tmp_path / 'a.pth'))


@needs_safe_loading
def test_the_list_of_allowed_objects_does_not_leak(tmp_path):
    torch.save(dict(a=HistoryBuffer()), tmp_path / 'a.pth')
    load_from_local(str(tmp_path / 'a.pth'))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)
    torch.save(dict(args=argparse.ArgumentParser), tmp_path / 'b.pth')
    with pytest.raises(UnsafeCheckpointError, match=r'argparse\.ArgumentParser'):
        load_from_local(str(tmp_path / 'b.pth'))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth does not exist'):
        load_from_local('nowhere.pth')


@needs_safe_loading
@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('share', [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_damaged_not_unsafe(tmp_path, legacy, share):
    path = tmp_path / 'a.pth'
    checkpoint = dict(state_dict=dict(w=torch.randn(2000), v=torch.randn(500)))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    size = int(share * len(content))
    path.write_bytes(content[:size])
    with pytest.raises(DamagedCheckpointError, match=f'a.pth is damaged.*after {size} bytes'):
        load_from_local(str(path))


@needs_safe_loading
@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'version https://git-lfs'])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r'a\.pth is no checkpoint: it begins with'):
        load_from_local(str(tmp_path / 'a.pth'))
    torch.save(torch.ones(2), tmp_path / 'b.pth')
    with pytest.raises(DamagedCheckpointError, match='holds a Tensor, not a state dict'):
        load_from_local(str(tmp_path / 'b.pth'))
