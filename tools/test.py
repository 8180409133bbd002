"""Evaluates a detector or segmentor: ``python tools/test.py CONFIG CHECKPOINT [options]``."""

import argparse
from copy import deepcopy

from mmengine.config import Config, ConfigDict

from mmkw.engine.command_line import (
    add_common_arguments,
    build_runner,
    check_checkpoint,
    load_config,
)


def show_predictions(config: Config, args: argparse.Namespace) -> None:
    """Has the visualization hook draw the predictions."""
    kind = 'Seg' if config.default_scope == 'mmseg' else 'Det'
    drawing = ConfigDict(type=f'{kind}VisualizationHook')
    hook = config.default_hooks.setdefault('visualization', drawing)
    hook.draw = True
    hook.interval = 1
    hook.show, hook.wait_time = args.show, args.wait_time
    if args.show_dir and config.default_scope == 'mmseg':
        config.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook.test_out_dir = args.show_dir


def augment_at_test_time(config: Config) -> None:
    """Wraps model and pipeline for test-time augmentation; detection has flips as a default."""
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if config.default_scope != 'mmseg':
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        config.setdefault('tta_model', dict(type='DetTTAModel', tta_cfg=nms))
        meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = dict(type='PackDetInputs', meta_keys=(*meta, 'flip', 'flip_direction'))
        augmentation = dict(type='TestTimeAug', transforms=[flips, [pack]])
        config.setdefault('tta_pipeline', [*deepcopy(dataset.pipeline[:-1]), augmentation])
    dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def dump_predictions(config: Config, out: str) -> None:
    """Has an evaluator keep the predictions: a pickle for detection, a folder for segmentation."""
    if config.default_scope == 'mmseg':
        config.test_evaluator.output_dir = out
        config.test_evaluator.keep_results = True
        return
    evaluators = config.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    config.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]


def main() -> None:
    """Reads the command line and tests."""
    parser = argparse.ArgumentParser(description='Test and evaluate a detector or segmentor')
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='keep the predictions: a .pkl file (detection) or a folder (segmentation)'
    )
    parser.add_argument('--show', action='store_true', help='show the predictions on the screen')
    parser.add_argument('--show-dir', help='save pictures of the predictions in this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show a picture')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args()
    check_checkpoint(parser, args.checkpoint)

    config = load_config(args)
    config.load_from = args.checkpoint
    if args.out:
        if config.default_scope != 'mmseg' and not args.out.endswith(('.pkl', '.pickle')):
            parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
        dump_predictions(config, args.out)
    if args.show or args.show_dir:
        show_predictions(config, args)
    if args.tta:
        if config.default_scope == 'mmseg' and 'tta_model' not in config:
            parser.error(f'--tta needs tta_model and tta_pipeline, which {args.config} lacks')
        augment_at_test_time(config)
    build_runner(config).test()


if __name__ == '__main__':
    main()
