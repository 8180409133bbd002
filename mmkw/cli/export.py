"""``mmkw export CONFIG CHECKPOINT OUT``: a network as ONNX, or as a program of ``torch.export``."""

import argparse
from collections.abc import Sequence

import torch
from mmengine.model import revert_sync_batchnorm

from ..deploy import DenseNetwork, ExportError, export, to_static
from ..deploy.export import DYNAMIC, FORMS
from ..deploy.static import TOP
from ..engine.building import load_trained
from ..engine.command_line import add_config_options, config_of
from ..engine.images import ImageLoader
from .config import model_of, pixels


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog='mmkw export',
        description='Write backbone, neck and dense head of a detector, or the logits of a '
        'segmentor or classifier, to one file, and compare it with the network',
    )
    parser.add_argument('config', help='config file, or PACKAGE::CONFIG')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='file to write, .onnx or .pt2')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=pixels,
        default=(256, 256),
        help='height and width of the example',
    )
    parser.add_argument(
        '--fixed', nargs='+', default=[], choices=DYNAMIC, help='what stays as in the example'
    )
    parser.add_argument('--form', default='scan', choices=FORMS, help='see mmkw.deploy.export')
    parser.add_argument('--half', action='store_true', help='compute in float16')
    parser.add_argument('--backbone', action='store_true', help='export the backbone alone')
    parser.add_argument(
        '--images',
        nargs='+',
        help='with --form static: images, or folders, to average kernels over',
    )
    parser.add_argument(
        '--keep',
        nargs='+',
        default=(),
        help="for --form static: what stays dynamic, such as 'top 30 %%', or names of layers",
    )
    add_config_options(parser)
    args = parser.parse_args(argv)
    if (args.form == 'static') != bool(args.images) or (args.keep and not args.images):
        parser.error('--form static needs --images; --images and --keep are for it alone')
    config = config_of(parser, args.config, args.cfg_options)
    model = model_of(parser, args, config)
    try:
        load_trained(model, args.checkpoint, 'backbone' if args.backbone else '')
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        parser.error(f'checkpoint {args.checkpoint}: {error}')
    # SyncBatchNorm does not compute on a CPU.
    model = revert_sync_batchnorm(model)
    dynamic = [name for name in DYNAMIC if name not in args.fixed]
    try:
        form = args.form
        if form == 'static':
            words = ' '.join(args.keep)
            keep = words if TOP.fullmatch(words.strip()) else args.keep
            model, report = to_static(model, ImageLoader(config, args.images), keep)
            print(f'{report}\n')
            form = 'scan'
        network = model.backbone if args.backbone else DenseNetwork(model)
        example = torch.rand(2, 3, *args.shape)
        parity = export(network, example, args.out, dynamic=dynamic, form=form, half=args.half)
    except (ExportError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print('| images | difference | ms of the file | ms in PyTorch |\n|---|---|---|---|')
    for shape, difference, seconds in parity:
        times = ' | '.join(f'{1e3 * second:.1f}' for second in seconds)
        print(f'| {"x".join(map(str, shape))} | {difference:.1e} | {times} |')
    print(f'Written: {args.out}')
