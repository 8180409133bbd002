"""Trains a detector, segmentor or classifier: ``python tools/train.py CONFIG [options]``."""

import argparse
from pathlib import Path

from mmengine.device import get_device

from mmkw.engine.command_line import (
    add_common_arguments,
    build_runner,
    check_data,
    check_file,
    check_scopes,
    check_weights,
    checkpoint_faults,
    leave_processes,
    load_config,
)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description='Train a detector, segmentor or classifier')
    add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='auto|PATH',
        help='resume from a checkpoint; without a path from the latest in the work folder, if it '
        'has one',
    )
    args = parser.parse_args()
    if args.amp and get_device() == 'cpu':
        parser.error('--amp needs an accelerator, and none was found; train without it')
    if args.resume not in (None, 'auto'):
        check_file(parser, args.resume)

    config = load_config(parser, args)
    check_scopes(parser, config)
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            parser.error(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config, '
                f'which {args.config} lacks; add auto_scale_lr=dict(base_batch_size=16)'
            )
        config.auto_scale_lr.enable = True
    if args.resume == 'auto':
        # MMEngine would resume from load_from. The checkpoint hook takes it from start_from where
        # there is nothing to resume from yet.
        config.start_from = config.get('load_from') or config.get('start_from')
        config.load_from, config.resume = None, True
    elif args.resume is not None:
        config.load_from, config.resume = args.resume, True
    check_weights(parser, config)
    if config.get('load_from'):
        check_file(parser, config.load_from)
    saved = Path(config.work_dir)
    begins = not (saved / 'last_checkpoint').exists() and not any(saved.glob('*.pth'))
    if config.get('start_from') and begins:
        check_file(parser, config.start_from)
    check_data(parser, config, 'train_dataloader', 'val_dataloader', 'val_evaluator')
    with checkpoint_faults(parser):
        build_runner(config).train()
    leave_processes()


if __name__ == '__main__':
    main()
