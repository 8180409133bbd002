"""Trains and evaluates a small KernelWarehouse network on the CPU: ``make demo`` and ``demo-seg``.

Makes the data set, trains (resuming what was interrupted), evaluates on held-out images and draws
the predictions. Everything it writes lies in ``data/mini_coco`` and ``work_dirs/demo*``.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = 'data/mini_coco'


def run(title: str, script: str, *arguments: str) -> None:
    """Runs a script of this folder; stops with its exit status if it fails."""
    command = [f'tools/{script}', *arguments]
    print(f'\n== {title}: python {" ".join(command)}', flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f'{title} failed with exit status {status}; the output above says why.')


def make_data() -> None:
    """Makes the data set, or finds it made."""
    run('Data', 'dataset_converters/make_mini_coco.py', DATA, '--train', '1200', '--val', '200')


def train_and_test(title: str, config: str, work_dir: str, *options: str) -> dict[str, float]:
    """Trains, tests and draws; the metrics on the held-out images."""
    overrides = ['--cfg-options', *options] if options else []
    arguments = [config, '--work-dir', work_dir, '--resume', *overrides]
    run(f'Training, {title}', 'train.py', *arguments)
    checkpoint = (ROOT / work_dir / 'last_checkpoint').read_text()
    arguments = [config, checkpoint, '--work-dir', f'{work_dir}/test']
    pictures = ['--show-dir', str(ROOT / work_dir / 'pictures')]
    run(f'Evaluation, {title}', 'test.py', *arguments, *pictures)
    return json.loads(latest(work_dir, 'test/*/*.json').read_text())


def latest(work_dir: str, pattern: str) -> Path:
    """The newest file of a work folder that matches a pattern."""
    return max((ROOT / work_dir).glob(pattern), key=lambda path: path.stat().st_mtime)


def report(title: str, rows: dict[str, str], work_dir: str, start: float) -> None:
    """Prints the results and where they lie."""
    rows = {**rows, 'minutes': f'{(time.time() - start) / 60:.1f}'}
    width = max(map(len, rows))
    print(f'\n{title}, 200 held-out images')
    for name, value in rows.items():
        print(f'  {name:<{width}}  {value}')
    checkpoint = Path((ROOT / work_dir / 'last_checkpoint').read_text())
    print(f'log         {latest(work_dir, "2*/*.log").relative_to(ROOT)}')
    print(f'checkpoint  {work_dir}/{checkpoint.name}')
    print(f'pictures    {work_dir}/pictures')


def detection() -> None:
    """Mask R-CNN with a KernelWarehouse 1x ResNet18."""
    start, work_dir = time.time(), 'work_dirs/demo'
    make_data()
    config = 'configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
    metrics = train_and_test('KernelWarehouse', config, work_dir)
    kinds = {'box': 'bbox', 'mask': 'segm'}
    rows = {}
    for kind, key in kinds.items():
        rows[f'{kind} AP'] = f'{metrics[f"coco/{key}_mAP"]:.3f}'
        rows[f'{kind} AP50'] = f'{metrics[f"coco/{key}_mAP_50"]:.3f}'
    report('Mask R-CNN, KernelWarehouse 1x ResNet18', rows, work_dir, start)


def segmentation() -> None:
    """Semantic FPN with a KernelWarehouse 1x ResNet18, and a static one's first epoch."""
    start, work_dir = time.time(), 'work_dirs/demo-seg'
    make_data()
    static = train_and_test(
        'static, first epoch',
        'configs/demo/fpn_r18_mini-coco-semantic.py',
        f'{work_dir}-static',
        'train_cfg.max_iters=150',
        'train_cfg.val_interval=150',
    )
    config = 'configs/demo/fpn_kw1x-r18_mini-coco-semantic.py'
    metrics = train_and_test('KernelWarehouse', config, work_dir)
    rows = {
        'mIoU, static backbone after the first epoch': f'{static["mIoU"]:.1f}',
        'mIoU': f'{metrics["mIoU"]:.1f}',
        'mean accuracy': f'{metrics["mAcc"]:.1f}',
    }
    report('Semantic FPN, KernelWarehouse 1x ResNet18', rows, work_dir, start)


def main() -> None:
    """Runs a demo and prints its results."""
    parser = argparse.ArgumentParser(description='Train and evaluate a small network')
    demos = dict(detection=detection, segmentation=segmentation)
    parser.add_argument('task', choices=demos)
    demos[parser.parse_args().task]()


if __name__ == '__main__':
    main()
