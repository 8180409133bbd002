"""Trains a static Mask R-CNN on mini-COCO, then goes on with it and with its dynamic twins.

``warm_start.py [--epochs 1] [--seeds 0 1 2]``: AP of the static network and of KernelWarehouse 1x
and 4x started from it, before and after the same further training. Everything lies in
``work_dirs/warm_start``; what is there already is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = 'data/mini_coco'
WORK = 'work_dirs/warm_start'
STATIC = 'configs/demo/mask-rcnn_r18_fpn_mini-coco.py'
DYNAMIC = 'configs/demo/mask-rcnn_kw1x-r18_fpn_warm-start_mini-coco.py'
# Of the config.
SOURCE_EPOCHS = 6
# Config and overrides of every network.
NETWORKS = {
    'static': (STATIC, []),
    'KernelWarehouse 1x': (DYNAMIC, []),
    'KernelWarehouse 4x': (DYNAMIC, ['model.backbone.cell_num_ratio=4']),
}


def run(script: str, *arguments: str) -> None:
    """Runs a script of ``tools``; stops if it fails."""
    command = [f'tools/{script}', *arguments]
    print(f'== python {" ".join(command)}', flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(config: str, folder: str, epochs: int, *overrides: str) -> str:
    """Trains unless it was done; the last checkpoint."""
    last = ROOT / folder / f'epoch_{epochs}.pth'
    if not last.exists():
        options = ['--cfg-options', *overrides] if overrides else []
        run('train.py', config, '--work-dir', folder, *options)
    return str(last)


def average_precision(
    config: str, checkpoint: str, folder: str, overrides: list[str]
) -> tuple[float, float]:
    """Box and mask AP on the 200 held-out images, in percent."""
    if not list((ROOT / folder).glob('*/*.json')):
        options = ['--cfg-options', *overrides] if overrides else []
        run('test.py', config, checkpoint, '--work-dir', folder, *options)
    (result,) = (ROOT / folder).glob('*/*.json')
    metrics = json.loads(result.read_text())
    return 100 * metrics['coco/bbox_mAP'], 100 * metrics['coco/segm_mAP']


def main() -> None:
    """Reads the command line, trains, tests and prints a table."""
    parser = argparse.ArgumentParser(description='Compare warm starts on mini-COCO')
    parser.add_argument('--epochs', type=int, default=1, help='of further training')
    parser.add_argument('--lr', type=float, default=3e-4, help='of further training')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()
    run('dataset_converters/make_mini_coco.py', DATA, '--train', '1200', '--val', '200')
    source = train(STATIC, f'{WORK}/source', SOURCE_EPOCHS)
    before, after = {}, {}
    for name, (config, overrides) in NETWORKS.items():
        folder = f'{WORK}/{name.replace(" ", "_")}'
        before[name] = average_precision(config, source, f'{folder}/before', overrides)
        after[name] = []
        for seed in args.seeds:
            schedule = [
                f'load_from={source}',
                f'randomness.seed={seed}',
                f'optim_wrapper.optimizer.lr={args.lr}',
                f'train_cfg.max_epochs={args.epochs}',
                f'train_cfg.val_interval={args.epochs}',
                f'param_scheduler.1.end={args.epochs}',
                f'param_scheduler.1.T_max={args.epochs}',
            ]
            own = f'{folder}/seed{seed}_{args.epochs}_epochs'
            checkpoint = train(config, own, args.epochs, *schedule, *overrides)
            found = average_precision(config, checkpoint, f'{own}/test', overrides)
            after[name].append(found)
            print(f'{name}, seed {seed}: box AP {found[0]:.1f}, mask AP {found[1]:.1f}', flush=True)
    print(f'\nBox AP / mask AP, 200 held-out images, {args.epochs} further epochs\n')
    seeds = ' | '.join(f'seed {seed}' for seed in args.seeds)
    print(f'| network | before | {seeds} | mean |')
    print('|---|---|' + '---|' * (len(args.seeds) + 1))
    for name, results in after.items():
        cells = [before[name], *results, tuple(map(statistics.mean, zip(*results)))]
        print(f'| {name} | ' + ' | '.join(f'{box:.1f} / {mask:.1f}' for box, mask in cells) + ' |')


if __name__ == '__main__':
    main()
