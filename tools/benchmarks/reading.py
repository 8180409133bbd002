"""Time to read a checkpoint as data, beside ``torch.load``: ``reading.py [--copies N]``."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from mmkw.checkpoints import read_checkpoint


def write(path: Path, copies: int) -> int:
    """Writes ResNets with the states of AdamW.

    Args:
        path: The file.
        copies: How many networks.

    Returns:
        The number of tensors.
    """
    from mmdet.models import ResNet

    state = nn.ModuleList(ResNet(50) for _ in range(copies)).state_dict()
    moments = {
        index: dict(exp_avg=torch.randn(tensor.shape), exp_avg_sq=torch.randn(tensor.shape))
        for index, tensor in enumerate(state.values())
    }
    torch.save(dict(state_dict=state, optimizer=dict(state=moments)), path)
    return 3 * len(state)


def seconds(read: Callable[[], object]) -> float:
    """How long one reading takes."""
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def main() -> None:
    """Reads the command line, measures in turns and prints medians."""
    parser = argparse.ArgumentParser(description='Time to read a checkpoint')
    parser.add_argument('--copies', type=int, default=2, help='ResNet50s in the file')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'checkpoint.pth'
        count = write(path, args.copies)
        size = path.stat().st_size / 1e6
        ways = {
            'read_checkpoint': lambda: read_checkpoint(path, 'cpu'),
            'torch.load(weights_only=True)': lambda: torch.load(path, 'cpu', weights_only=True),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats + 1):
            for name, read in ways.items():
                times[name].append(seconds(read))
        print(f'{size:.0f} MB, {count} tensors, median of {args.repeats}')
        # The first reading brings the file into memory.
        medians = {name: median(measured[1:]) for name, measured in times.items()}
        for name, value in medians.items():
            print(f'{name}: {value:.3f} s')
        ours, theirs = medians.values()
        print(f'ratio: {ours / theirs:.2f}')


if __name__ == '__main__':
    main()
