"""Trains small networks on the CPU, static and dynamic: ``make demo`` and ``make demo-seg``.

Makes the data set and trains a static network. From its weights the static network and one with
KernelWarehouse go on, equally long and at the same rate. Both are tested on held-out images, and
what they predict is drawn. Training that was interrupted is resumed. Everything lies in ``data``
and ``work_dirs/demo*``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools/benchmarks'))

from study import FASTER, IMAGES, TASKS, Task, latest  # noqa: E402

FIRST, FURTHER = 4, 2  # epochs
# What is learnt, the network's name, its dynamic config, and where all goes.
DEMOS = {
    'detection': (
        TASKS['conditions, half as wide'],
        'Mask R-CNN, ResNet18 half as wide',
        'mask-rcnn_kw1x-r18-half_fpn_warm-start_mini-conditions',
        'work_dirs/demo',
    ),
    'segmentation': (
        TASKS['segmentation under conditions, half as wide'],
        'Semantic FPN, ResNet18 half as wide',
        'fpn_kw1x-r18-half_warm-start_mini-conditions-semantic',
        'work_dirs/demo-seg',
    ),
}


def run(title: str, script: str, *arguments: str) -> None:
    """Runs a script of this folder; stops with its exit status if it fails."""
    command = [f'tools/{script}', *arguments]
    print(f'\n== {title}: python {" ".join(command)}', flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f'{title} failed with exit status {status}; the output above says why.')


def train(title: str, config: str, work_dir: str, options: Mapping[str, Any]) -> str:
    """Trains, or goes on with what was interrupted; the last checkpoint."""
    last = ROOT / work_dir / 'last_checkpoint'
    resume = ['--resume'] if last.exists() else []
    overrides = [f'{name}={value}' for name, value in options.items()]
    arguments = [config, '--work-dir', work_dir, *resume, '--cfg-options', *overrides]
    run(f'Training, {title}', 'train.py', *arguments)
    return last.read_text()


def test(title: str, config: str, checkpoint: str, work_dir: str, task: Task) -> list[str]:
    """Tests and draws; the metrics in per cent."""
    pictures = ['--show-dir', str(ROOT / work_dir / 'pictures')]
    run(
        f'Test, {title}', 'test.py', config, checkpoint, '--work-dir', f'{work_dir}/test', *pictures
    )
    found = json.loads(latest(work_dir, 'test/*/*.json').read_text())
    return [f'{task.scale * found[key]:.1f}' for key in task.metrics.values()]


def show(task: Task, network: str, dynamic: str, work_dir: str) -> None:
    """Trains and tests the three networks, and prints what they reach."""
    start = time.time()
    data = f'data/{task.data}'
    run('Data', 'dataset_converters/make_mini_coco.py', data, *IMAGES[task.data].split())
    static = f'configs/demo/{task.config}.py'
    # The test that follows takes the place of validations.
    first = {**task.length(FIRST), 'train_cfg.val_interval': 10**6}
    weights = train('static', static, f'{work_dir}-start', first)
    further = {**first, **task.length(FURTHER), **FASTER, 'load_from': weights}
    rows = {f'static, {FIRST} epochs': (static, weights, f'{work_dir}-start')}
    for title, config, folder in (
        ('static', static, f'{work_dir}-static'),
        ('KernelWarehouse 1x', f'configs/demo/{dynamic}.py', work_dir),
    ):
        checkpoint = train(f'{title}, from there', config, folder, further)
        rows[f'{title}, {FURTHER} epochs from there'] = config, checkpoint, folder
    found = {title: test(title, *row, task) for title, row in rows.items()}
    print(f'\n{network}, 200 held-out images: {", ".join(task.metrics)}')
    for title, values in found.items():
        print(f'  {title:<40}  {"  ".join(values)}')
    print(f'{(time.time() - start) / 60:.1f} minutes')
    for title, (_, checkpoint, folder) in rows.items():
        path = Path(checkpoint).relative_to(ROOT)
        print(f'{title}: {path}, pictures in {folder}/pictures')


def main() -> None:
    """Runs a demo and prints its results."""
    parser = argparse.ArgumentParser(description='Train and test small networks')
    parser.add_argument('task', choices=DEMOS)
    show(*DEMOS[parser.parse_args().task])


if __name__ == '__main__':
    main()
