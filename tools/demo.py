"""Trains and evaluates a small KernelWarehouse Mask R-CNN on the CPU: ``make demo``.

Makes the data set, trains (resuming what was interrupted), evaluates on held-out images and draws
the predicted masks. Everything it writes lies in ``data/mini_coco`` and ``work_dirs/demo``.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = 'configs/demo/mask-rcnn_kw1x-r18_fpn_mini-coco.py'
DATA = 'data/mini_coco'
WORK_DIR = 'work_dirs/demo'
PICTURES = f'{WORK_DIR}/pictures'
ROWS = {
    'box AP': 'coco/bbox_mAP',
    'box AP50': 'coco/bbox_mAP_50',
    'mask AP': 'coco/segm_mAP',
    'mask AP50': 'coco/segm_mAP_50',
}


def run(title: str, script: str, *arguments: str) -> None:
    """Runs a script of this folder; stops with its exit status if it fails."""
    command = [f'tools/{script}', *arguments]
    print(f'\n== {title}: python {" ".join(command)}', flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f'{title} failed with exit status {status}; the output above says why.')


def latest(pattern: str) -> Path:
    """The newest file of the work folder that matches a pattern."""
    return max((ROOT / WORK_DIR).glob(pattern), key=lambda path: path.stat().st_mtime)


def main() -> None:
    """Runs the demo and prints its results."""
    start = time.time()
    run('Data', 'dataset_converters/make_mini_coco.py', DATA, '--train', '1200', '--val', '200')
    run('Training', 'train.py', CONFIG, '--work-dir', WORK_DIR, '--resume')
    checkpoint = Path((ROOT / WORK_DIR / 'last_checkpoint').read_text())
    run(
        'Evaluation',
        'test.py',
        CONFIG,
        str(checkpoint),
        '--work-dir',
        f'{WORK_DIR}/test',
        '--show-dir',
        str(ROOT / PICTURES),
    )
    metrics = json.loads(latest('test/*/*.json').read_text())

    print('\nMask R-CNN, KernelWarehouse 1x ResNet18, 200 held-out images')
    for name, key in ROWS.items():
        print(f'  {name:<10} {metrics[key]:.3f}')
    print(f'  {"minutes":<10} {(time.time() - start) / 60:.1f}')
    print(f'log         {latest("2*/*.log").relative_to(ROOT)}')
    print(f'checkpoint  {WORK_DIR}/{checkpoint.name}')
    print(f'pictures    {PICTURES}')


if __name__ == '__main__':
    main()
