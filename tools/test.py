"""Evaluates a model: ``python tools/test.py CONFIG CHECKPOINT [options]``."""

import argparse
from copy import deepcopy

from mmengine.config import Config, ConfigDict

from mmkw.engine.building import type_name
from mmkw.engine.command_line import (
    add_common_arguments,
    build_runner,
    check_data,
    check_file,
    check_scopes,
    checkpoint_faults,
    leave_processes,
    library_of,
    load_config,
)

HOOKS = dict(
    mmdet='DetVisualizationHook', mmseg='SegVisualizationHook', mmpretrain='VisualizationHook'
)
# Of MMSegmentation, that write what they are given.
WRITING_METRICS = ('IoUMetric', 'CityscapesMetric')


def show_predictions(config: Config, args: argparse.Namespace) -> None:
    """Has the visualization hook draw the predictions."""
    library = library_of(config)
    drawing = ConfigDict(type=f'{library}.{HOOKS[library]}')
    hooks = config.setdefault('default_hooks', ConfigDict())
    hook = hooks.setdefault('visualization', drawing)
    hook['enable' if library == 'mmpretrain' else 'draw'] = True
    hook.interval = 1
    hook.show, hook.wait_time = args.show, args.wait_time
    if args.show_dir and library == 'mmseg':
        config.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook['out_dir' if library == 'mmpretrain' else 'test_out_dir'] = args.show_dir


def augment_at_test_time(config: Config) -> None:
    """Wraps model and pipeline for test-time augmentation.

    Detection and classification have flips as a default.
    """
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    library = library_of(config)
    if library == 'mmpretrain':
        config.setdefault('tta_model', dict(type='mmpretrain.AverageClsScoreTTA'))
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        augmentation = dict(type='TestTimeAug', transforms=[flips, [dataset.pipeline[-1]]])
        config.setdefault('tta_pipeline', [*deepcopy(dataset.pipeline[:-1]), augmentation])
    elif library == 'mmdet':
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        config.setdefault('tta_model', dict(type='DetTTAModel', tta_cfg=nms))
        meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        flips = [dict(type='mmdet.RandomFlip', prob=p) for p in (1.0, 0.0)]
        pack = dict(type='mmdet.PackDetInputs', meta_keys=(*meta, 'flip', 'flip_direction'))
        augmentation = dict(type='TestTimeAug', transforms=[flips, [pack]])
        config.setdefault('tta_pipeline', [*deepcopy(dataset.pipeline[:-1]), augmentation])
    dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def dump_predictions(parser: argparse.ArgumentParser, config: Config, out: str) -> None:
    """Has an evaluator keep the predictions: in a folder for segmentation, else in a pickle."""
    evaluators = config.test_evaluator
    evaluators = list(evaluators) if isinstance(evaluators, (list, tuple)) else [evaluators]
    library = library_of(config)
    if library == 'mmseg':
        keepers = [e for e in evaluators if type_name(e) in WRITING_METRICS]
        if not keepers:
            parser.error(f'--out needs one of {WRITING_METRICS} in test_evaluator')
        keepers[0].output_dir = out
        keepers[0].keep_results = True
        return
    if not out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {out}')
    kind = 'mmdet.DumpDetResults' if library == 'mmdet' else 'DumpResults'
    config.test_evaluator = [*evaluators, dict(type=kind, out_file_path=out)]


def main() -> None:
    """Reads the command line and tests."""
    parser = argparse.ArgumentParser(
        description='Test and evaluate a detector, segmentor or classifier'
    )
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='keep the predictions: a folder for segmentation, else a .pkl file'
    )
    parser.add_argument('--show', action='store_true', help='show the predictions on the screen')
    parser.add_argument('--show-dir', help='save pictures of the predictions in this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show a picture')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    args = parser.parse_args()
    check_file(parser, args.checkpoint)

    config = load_config(parser, args)
    check_scopes(parser, config)
    config.load_from, config.resume = args.checkpoint, False
    if args.out:
        dump_predictions(parser, config, args.out)
    if args.show or args.show_dir:
        show_predictions(config, args)
    if args.tta:
        if library_of(config) == 'mmpretrain' and (args.show or args.show_dir):
            parser.error("--show and --show-dir: MMPretrain's hook draws no pictures with --tta")
        if library_of(config) == 'mmseg' and 'tta_model' not in config:
            parser.error(f'--tta needs tta_model and tta_pipeline, which {args.config} lacks')
        augment_at_test_time(config)
    check_data(parser, config, 'test_dataloader', 'test_evaluator')
    with checkpoint_faults(parser):
        build_runner(config).test()
    leave_processes()


if __name__ == '__main__':
    main()
