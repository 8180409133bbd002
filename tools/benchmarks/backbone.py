"""Times backbones against their static twin.

``backbone.py R50 --budgets 1 4 --shapes 1x224x224 8x224x224 --mode train --published --memory``
Growth over batch, budget or image size is a list of shapes or budgets.
"""

from functools import partial

import torch
from harness import Case, compare, make_cases, parse_shape, parser
from mmengine.registry import MODELS
from torch import nn

# The static network, the dynamic one, and the options of both.
BACKBONES = {
    'R18': ('mmkw.ResNet', 'mmkw.KWResNet', dict(depth=18)),
    'R50': ('mmkw.ResNet', 'mmkw.KWResNet', dict(depth=50)),
    'ConvNeXt-T': ('mmkw.ConvNeXt', 'mmkw.KWConvNeXt', dict(arch='tiny')),
    'MobileNetV2': ('mmkw.MobileNetV2', 'mmkw.KWMobileNetV2', dict(out_indices=(1, 2, 4, 7))),
}


def build(name: str, budget: float | None) -> nn.Module:
    """Builds a backbone with random weights.

    Args:
        name: One of ``BACKBONES``.
        budget: ``None`` for the static network. Cells are halved in both directions below 1, and
            pointwise convolutions of a MobileNetV2 share as in the paper.
    """
    static, dynamic, options = BACKBONES[name]
    if not name.startswith('ConvNeXt'):
        # A training step from scratch.
        options = dict(options, norm_eval=False)
    if budget is None:
        return MODELS.build(dict(type=static, **options))
    cells = {} if budget >= 1 else dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)
    if name == 'MobileNetV2':
        cells['pointwise'] = 'joint' if budget <= 1 else 'separate'
    return MODELS.build(dict(type=dynamic, cell_num_ratio=budget, **cells, **options))


def main() -> None:
    """Reads the command line, measures and reports."""
    options = parser(__doc__)
    options.add_argument('backbone', choices=BACKBONES)
    options.add_argument('--budgets', type=float, nargs='+', default=[1])
    args = options.parse_args()

    def cases_of(shape: str, only: str | None) -> list[Case]:
        torch.manual_seed(0)
        batch, height, width = parse_shape(shape)
        x = torch.randn(batch, 3, height, width)
        variants = {'static': partial(build, args.backbone, None)}
        variants |= {f'kw {b:g}x': partial(build, args.backbone, b) for b in args.budgets}
        return make_cases(
            args, variants, lambda network: sum(y.square().mean() for y in network(x)), only
        )

    compare(args.backbone, args, cases_of)


if __name__ == '__main__':
    main()
