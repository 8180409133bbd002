"""Watches the memory of a process over many steps, of a dynamic network and of the static one.

``long_run.py --steps 1000``: training steps, then gradients of the images alone, which do not come
to the cells. Of Linux, for its count of a process's pages.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from backbone import build
from torch import nn


def resident() -> float:
    """Megabytes that the process has in memory."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def train(network: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """A training step."""
    optimizer.zero_grad()
    sum(y.square().mean() for y in network(x)).backward()
    optimizer.step()


def saliency(network: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """The gradient of the images."""
    image = x.clone().requires_grad_()
    torch.autograd.grad(sum(y.square().mean() for y in network(image)), image)


def watch(budget: float | None, steps: int) -> None:
    """Prints a line for each kind of step, counted from when caches are as large as they get.

    Memory comes and goes by a few per cent from step to step, so that the most of one half of the
    steps is compared with the most of the other.
    """
    warm_up = max(steps // 10, 1)
    torch.manual_seed(0)
    network = build('R18', budget)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    name = 'static' if budget is None else f'kw {budget:g}x'
    for step in (train, saliency):
        most = [0.0, 0.0]
        for index in range(-warm_up, steps):
            step(network, optimizer, torch.randn(2, 3, 64, 64))
            if index >= 0:
                half = 2 * index // steps
                most[half] = max(most[half], resident())
        first, second = most
        growth = 100 * (second / first - 1)
        print(
            f'| {name} | {step.__name__} | {first:.0f} | {second:.0f} | {growth:+.2f} % |',
            flush=True,
        )


def main() -> None:
    """Reads the command line; every network gets a process of its own."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--steps', type=int, default=1000)
    options.add_argument('--budgets', type=float, nargs='+', default=[1])
    options.add_argument('--only', type=float, help='the budget of one network; 0 is the static')
    args = options.parse_args()
    if args.steps < 2:
        options.error(f'--steps {args.steps} has no two halves to compare; take 2 or more')
    if args.only is not None:
        watch(args.only or None, args.steps)
        return
    print(f'| ResNet18, {args.steps} steps | step | most MB, first half | second half | growth |')
    print('|---|---|---|---|---|', flush=True)
    for budget in (0, *args.budgets):
        command = [sys.executable, __file__, '--steps', str(args.steps), '--only', str(budget)]
        subprocess.run(command, check=True)


if __name__ == '__main__':
    main()
