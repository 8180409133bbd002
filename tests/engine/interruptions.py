"""Trains, is killed and resumes, over and over: ``interruptions.py FOLDER --kills N [options]``.

Every training runs in a process of its own, forked from this one, which has imported everything.
Half of the kills come at a random moment. The others hit what happens to the checkpoint files: just
before a random operation on one (creating, renaming, removing), or in the middle of writing one,
where the kernel ends the process at a limit of the file size. Prints one line of JSON.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

# A training imports these on its way.
import matplotlib.pyplot  # noqa: F401
import mmcv.ops  # noqa: F401
import torch
import torch._dynamo
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmkw.checkpoints import read_checkpoint
from mmkw.layers import KWConv2d

EPOCHS = 5


class Model(BaseModel):
    """A convolution, a batch norm, a linear layer."""

    def __init__(self, dynamic):
        super().__init__()
        self.conv = KWConv2d(3, 32, 3, cell_num_ratio=4) if dynamic else nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 4096)

    def forward(self, inputs, mode):
        features = self.norm(self.conv(torch.stack(inputs))).relu().mean((2, 3))
        out = self.fc(nn.functional.dropout(features, 0.2, mode == 'loss'))
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


class Noise(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 6, 6) + index)


SCHEDULER = dict(type='LinearLR', start_factor=0.1, end=8, by_epoch=False)


def make_runner(
    folder, dynamic, kept=-1, epochs=EPOCHS, start_from=None, scheduler=SCHEDULER, **hook
):
    torch.manual_seed(0)
    return Runner(
        Model(dynamic),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=Noise(),
            sampler=dict(type='DefaultSampler', shuffle=True),
            batch_size=2,
            num_workers=0,
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=scheduler,
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(dict(type='CheckpointHook', interval=1, max_keep_ckpts=kept), **hook),
        ),
        custom_hooks=[dict(type='mmkw.IterationSeedHook')],
        randomness=dict(seed=3),
        resume=True,
        cfg=dict(start_from=start_from),
        experiment_name=f'{folder}-{time.time()}',
    )


def kill_at_a_file(draw):
    """Has this process killed before, or while, it does something to a checkpoint file."""
    left = [draw.randrange(1, 16)]
    cut = draw.random() < 0.5
    size = draw.randrange(1, 400_000)

    def watch(event, arguments):
        if event not in ('open', 'os.rename', 'os.remove'):
            return
        path = str(arguments[0])
        if not any(part in path for part in ('.pth', 'last_checkpoint')):
            return
        if event == 'open' and not (
            isinstance(arguments[1], str) and set('wx') & set(arguments[1])
        ):
            return
        left[0] -= 1
        if left[0] <= 0 and cut and event == 'open' and '.pth' in path:
            # The write that goes beyond the limit ends the process.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        elif left[0] <= 0 and not cut:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run(folder, dynamic, kept, log, kill=None, after=None):
    """One training: whether it came to its end, None if it was killed within a write."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            if kill is not None:
                kill_at_a_file(kill)
            make_runner(folder, dynamic, kept).train()
            status = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, 'a training failed; see the log'
    within_write = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
    return None if within_write else os.WIFEXITED(status)


def result(folder, epochs=EPOCHS):
    """All that a training ends with and that does not depend on the clock."""
    checkpoint = read_checkpoint(folder / f'epoch_{epochs}.pth')
    tensors = list(checkpoint['state_dict'].values())
    for state in checkpoint['optimizer']['state'].values():
        tensors += [torch.as_tensor(value) for value in state.values()]
    for name, history in checkpoint['message_hub']['log_scalars'].items():
        if 'time' not in name:
            tensors += [torch.as_tensor(part) for part in history.data]
    return tensors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    counts = dict(kills=0, at_files=0, within_writes=0, trainings=0)
    with open(args.folder / 'log.txt', 'a') as log:
        expected, seconds = {}, {}
        for dynamic in (True, False):
            begin = time.time()
            folder = args.folder / f'uninterrupted-{dynamic}'
            assert run(folder, dynamic, 1, log)
            expected[dynamic], seconds[dynamic] = result(folder), time.time() - begin
        while counts['kills'] < args.kills:
            number = counts['trainings']
            dynamic, kept = number % 2 == 0, 1 + number // 2 % 2
            folder = args.folder / str(number)
            interruptions, ended = 0, False
            while not ended:
                at_files = 2 * counts['at_files'] <= counts['kills'] + interruptions
                if interruptions >= 5:
                    ended = run(folder, dynamic, kept, log)
                elif at_files:
                    ended = run(folder, dynamic, kept, log, kill=draw)
                else:
                    after = draw.random() * seconds[dynamic]
                    ended = run(folder, dynamic, kept, log, after=after)
                if not ended:
                    interruptions += 1
                    counts['at_files'] += at_files
                    counts['within_writes'] += ended is None
            counts['kills'] += interruptions
            counts['trainings'] += 1
            got = result(folder)
            assert len(got) == len(expected[dynamic]), folder
            assert all(map(torch.equal, got, expected[dynamic])), folder
            whole = sorted(path.name for path in folder.glob('*.pth*'))
            assert whole == [f'epoch_{n}.pth' for n in range(EPOCHS - kept + 1, EPOCHS + 1)], whole
    print(json.dumps(counts))


if __name__ == '__main__':
    main()
