"""Checks the fields of a checkpoint that MMEngine acts on.

The reader makes sure that a file holds data only. But MMEngine acts on some of the data. It would
run the text of a config, remove files that a checkpoint names, and use an epoch that is text.
"""

import os.path as osp
import re
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log

# Fields that hold the text of a config. A config is Python code. Runner.resume would run the first
# one, and an inferencer without a model would run the others.
_CONFIG_TEXTS = (('meta', 'config'), ('meta', 'cfg'), ('message_hub', 'runtime_info', 'cfg'))
# The name that MMEngine's hook gives to the best checkpoint of a metric.
_BEST = re.compile(r'best_[^/\\\0]+_[0-9]{1,12}\.pth')


def _is_number(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value < high


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _are_settings(value: Any) -> bool:
    """Whether a value is the state of schedulers: a list of dicts, or one for each optimizer."""
    lists = value.values() if _is_dict(value) else [value]
    return all(isinstance(part, list) and all(map(_is_setting, part)) for part in lists)


def _is_setting(value: Any) -> bool:
    """Whether a value is the state of a scheduler. MMEngine sets its items as attributes."""
    from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

    return _is_dict(value) and not any(
        callable(getattr(_ParamScheduler, key, None)) or key.startswith('__') for key in value
    )


_COUNTER = (_is_number(0, 1 << 53), 'a whole number')
_DICT = (_is_dict, 'a dict with texts as keys')
# The check of every field, and words for the expected kind. A field may be missing.
_FIELDS: dict[tuple[str, ...], tuple[Callable[[Any], bool], str]] = {
    ('meta',): _DICT,
    ('meta', 'epoch'): _COUNTER,
    ('meta', 'iter'): _COUNTER,
    ('meta', 'seed'): (
        lambda seed: seed is None or _is_number(0, 1 << 32)(seed),
        'a whole number below 2**32',
    ),
    ('message_hub',): _DICT,
    ('message_hub', 'log_scalars'): _DICT,
    ('message_hub', 'runtime_info'): _DICT,
    ('message_hub', 'resumed_keys'): _DICT,
    ('optimizer',): _DICT,
    ('param_schedulers',): (_are_settings, 'a list of settings of schedulers'),
    ('ema_state_dict',): _DICT,
}


def take(checkpoint: dict[str, Any], name: str, folder: str | None = None) -> dict[str, Any]:
    """Checks the fields that MMEngine acts on, and removes those that it should not act on.

    Args:
        checkpoint: A checkpoint from ``read_checkpoint``; changed in place.
        name: Name of the file, for messages.
        folder: Folder of the file, if it is on this machine. The best checkpoints that the file
            names must be in this folder.

    Returns:
        The same checkpoint.

    Raises:
        DamagedCheckpointError: If a field is of the wrong kind.
    """
    from ...checkpoints import DamagedCheckpointError

    # Without state_dict the file is a dict of tensors, whose names may look like fields.
    if 'state_dict' not in checkpoint:
        return checkpoint
    for field, (fits, kind) in _FIELDS.items():
        holder = _holder(checkpoint, field)
        if holder is not None and field[-1] in holder and not fits(holder[field[-1]]):
            raise DamagedCheckpointError(
                f'Checkpoint {name} holds {".".join(field)}, which is not {kind}.'
            )
    left = []
    for field in _CONFIG_TEXTS:
        holder = _holder(checkpoint, field)
        if holder is not None and holder.pop(field[-1], None) is not None:
            left.append('.'.join(field))
    if left:
        print_log(
            f'{name}: {" and ".join(left)} left aside, since a config is code; an inferencer needs '
            'model=CONFIG beside weights',
            logger='current',
        )
    info = _holder(checkpoint, ('message_hub', 'runtime_info', ''))
    if info is not None:
        _take_kept(info, checkpoint.get('meta', {}))
        _take_best(info, folder)
    return checkpoint


def _holder(checkpoint: dict[str, Any], field: tuple[str, ...]) -> dict[str, Any] | None:
    """The dict that may have a field; None if there is no such dict."""
    holder: Any = checkpoint
    for parent in field[:-1]:
        holder = holder.get(parent) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) else None


def _take_kept(info: dict[str, Any], meta: dict[str, Any]) -> None:
    """Removes the list of kept checkpoints unless it has increasing steps up to this one's."""
    if 'keep_ckpt_ids' not in info:
        return
    kept = info['keep_ckpt_ids']
    last = max(meta.get('epoch', 0), meta.get('iter', 0))
    whole = isinstance(kept, list) and all(map(_is_number(1, last + 1), kept))
    if whole and kept == sorted(set(kept)):
        return
    del info['keep_ckpt_ids']


def _take_best(info: dict[str, Any], folder: str | None) -> None:
    """Moves the paths of the best checkpoints to this folder, and removes other entries.

    MMEngine removes the best checkpoint when a better one is saved, so its path must be safe.
    """
    for key in [key for key in info if key.startswith(('best_ckpt', 'best_score'))]:
        value = info[key]
        if key.startswith('best_score'):
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = info[key] = value.item()
            number = isinstance(value, (int, float)) or type(value).__module__ == 'numpy'
            if not number or value != value:
                del info[key]
            continue
        name = re.split(r'[/\\]', value)[-1] if isinstance(value, str) else ''
        if folder is None or not _BEST.fullmatch(name):
            del info[key]
        else:
            info[key] = osp.join(folder, name)
