"""Makes a resumed run repeat the uninterrupted one."""

import itertools
import random
from collections.abc import Iterator

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
        """Makes an iteration-based loop seed before every batch, also before skipped batches."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _seeded(loop.dataloader_iterator, runner.seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seeds the random numbers that are drawn before the first iteration of an epoch."""
        _seed_everything(runner.seed, get_rank(), runner.iter, 0)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: DATA_BATCH = None
    ) -> None:
        """Seeds the random numbers of the iteration."""
        _seed_everything(runner.seed, get_rank(), runner.iter, 1)


def _seeded(batches: Iterator[DATA_BATCH], seed: int) -> Iterator[DATA_BATCH]:
    for index in itertools.count():
        _seed_everything(seed, get_rank(), index, 0)
        yield next(batches)


def _seed_everything(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
