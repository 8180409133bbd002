"""Makes a resumed run repeat the uninterrupted one."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.hooks.hook import DATA_BATCH
from mmengine.runner import IterBasedTrainLoop, Runner

from ...registry import HOOKS


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds all random generators from the run's seed, the process and the iteration.

    MMEngine's checkpoints hold no state of random generators. So dropped paths and sampled
    proposals differ after a resume. With this hook they depend on the iteration only: a resumed run
    ends with the weights of the uninterrupted run. The weights are equal to the bit if the device
    computes deterministically, as the CPU does.

    The config needs a fixed ``randomness=dict(seed=...)``. With an epoch-based loop, the train
    dataloader must not have ``persistent_workers``, whose random numbers continue from epoch to
    epoch.
    """

    def before_train(self, runner: Runner) -> None:
        """Makes an iteration-based loop seed before every batch, also before skipped batches.

        Warns where the workers of an epoch-based loop persist.
        """
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _Seeded(loop.dataloader_iterator, runner.seed)
        elif getattr(loop.dataloader, 'persistent_workers', False):
            runner.logger.warning(
                'train_dataloader.persistent_workers is True: the random numbers of its workers '
                'go on from epoch to epoch, so a resumed run will not repeat this one. For that '
                'set train_dataloader=dict(persistent_workers=False).'
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the random numbers that are drawn before the first iteration of an epoch.

        The data loader's workers begin anew in every epoch. MMEngine gives them the same seed each
        time, here they get one of the epoch.
        """
        _seed_everything(runner.seed, get_rank(), runner.iter, 0)
        loader = runner.train_loop.dataloader
        start = getattr(loader, 'worker_init_fn', None)
        if isinstance(start, partial) and 'seed' in start.keywords:
            loader.worker_init_fn = partial(start, seed=int(np.random.randint(2**31)))

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DATA_BATCH = None
    ) -> None:
        """Seeds the random numbers of the iteration."""
        _seed_everything(runner.seed, get_rank(), runner.iter, 1)


class _Seeded:
    """The batches of an endless loop, seeded before each one by its number."""

    def __init__(self, batches: Any, seed: int) -> None:
        self._batches = batches
        self._seed = seed
        self._next = 0

    def __iter__(self) -> Iterator[DATA_BATCH]:
        return self

    def __next__(self) -> DATA_BATCH:
        # Making an iterator draws a random number. OneDL's loop makes it late.
        getattr(self._batches, '_ensure_iterator', lambda: None)()
        _seed_everything(self._seed, get_rank(), self._next, 0)
        self._next += 1
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """What OneDL's loop calls instead of taking the batches that a resumed run has had."""
        self._next += count
        self._batches.skip_iter(count)


def _seed_everything(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
