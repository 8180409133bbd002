"""Times backbones against their static twin.

``backbone.py R50 --budgets 1 4 --shapes 1x224x224 8x224x224 --mode train --published --memory``
Growth over batch, budget or image size is a list of shapes or budgets.
``--methods dyconv:4 odconv:1`` adds other dynamic convolutions, with so many kernels.
"""

import argparse
from functools import partial

import torch
from harness import Case, compare, make_cases, parse_shape, parser
from mmengine.registry import MODELS
from torch import nn

from mmkw import quantize_cells
from mmkw.layers.partition import KERNELWAREHOUSE, is_comparator

# The static network, the dynamic one, and the options of both.
BACKBONES = {
    'R18': ('mmkw.ResNet', 'mmkw.KWResNet', dict(depth=18)),
    'R50': ('mmkw.ResNet', 'mmkw.KWResNet', dict(depth=50)),
    'ConvNeXt-T': ('mmkw.ConvNeXt', 'mmkw.KWConvNeXt', dict(arch='tiny')),
    'MobileNetV2': ('mmkw.MobileNetV2', 'mmkw.KWMobileNetV2', dict(out_indices=(1, 2, 4, 7))),
}


def build(name: str, budget: float | None, method: str = KERNELWAREHOUSE) -> nn.Module:
    """Builds a backbone with random weights.

    Args:
        name: One of ``BACKBONES``.
        budget: ``None`` for the static network. Cells are halved in both directions below 1, and
            pointwise convolutions of a MobileNetV2 share as in the paper.
        method: As in :class:`mmkw.layers.WarehouseOptions`; the budget of others than
            KernelWarehouse is their number of kernels.
    """
    static, dynamic, options = BACKBONES[name]
    if not name.startswith('ConvNeXt'):
        # A training step from scratch.
        options = dict(options, norm_eval=False)
    if budget is None:
        return MODELS.build(dict(type=static, **options))
    if method != KERNELWAREHOUSE:
        return MODELS.build(dict(type=dynamic, method=method, cell_num_ratio=budget, **options))
    cells = {} if budget >= 1 else dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
    if name == 'MobileNetV2':
        cells['pointwise'] = 'joint' if budget <= 1 else 'separate'
    return MODELS.build(dict(type=dynamic, cell_num_ratio=budget, **cells, **options))


def comparator(text: str) -> tuple[str, int]:
    """Reads METHOD:KERNELS of the command line."""
    method, _, kernels = text.partition(':')
    if not is_comparator(method) or not kernels.isdecimal():
        raise argparse.ArgumentTypeError(f'must be such as odconv:4, got {text!r}')
    return method, int(kernels)


def main() -> None:
    """Reads the command line, measures and reports."""
    options = parser(__doc__)
    options.add_argument('backbone', choices=BACKBONES)
    options.add_argument('--budgets', type=float, nargs='+', default=[1])
    options.add_argument(
        '--methods',
        nargs='+',
        type=comparator,
        default=[],
        help='other dynamic convolutions beside, each METHOD:KERNELS, such as odconv:4',
    )
    options.add_argument(
        '--precision',
        choices=('float32', 'autocast', 'bfloat16', 'int8', 'bfloat16 int8'),
        default='float32',
        help='of network and images; autocast: float32, computed in bfloat16; int8: of the cells',
    )
    args = options.parse_args()
    half = 'bfloat16' in args.precision
    # Under autocast cells are of float32, and packed in bfloat16 to learn.
    multiplied_in_half = half or (args.precision == 'autocast' and args.mode == 'train')

    def made(budget: float | None, method: str = KERNELWAREHOUSE) -> nn.Module:
        network = build(args.backbone, budget, method)
        if 'int8' in args.precision and budget is not None:
            network = quantize_cells(network)
        return network.bfloat16() if half else network

    def cases_of(shape: str, only: str | None) -> list[Case]:
        torch.manual_seed(0)
        batch, height, width = parse_shape(shape)
        x = torch.randn(batch, 3, height, width, dtype=torch.bfloat16 if half else torch.float32)
        variants = {'static': partial(made, None)}
        variants |= {f'kw {b:g}x': partial(made, b) for b in args.budgets}
        variants |= {f'{m} {kernels}x': partial(made, kernels, m) for m, kernels in args.methods}

        def loss(network: nn.Module) -> torch.Tensor:
            with torch.autocast('cpu', torch.bfloat16, enabled=args.precision == 'autocast'):
                return sum(y.float().square().mean() for y in network(x))

        return make_cases(args, variants, loss, only)

    title = args.backbone if args.precision == 'float32' else f'{args.backbone}, {args.precision}'
    compare(title, args, cases_of, torch.bfloat16 if multiplied_in_half else torch.float32)


if __name__ == '__main__':
    main()
