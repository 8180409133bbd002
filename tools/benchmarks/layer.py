"""Times one dynamic convolution against ``torch.nn.Conv2d``, attention included.

``layer.py --channels 256 256 --kernel 3 --layers 6 --budgets 1 4 --shapes 1x14x14 8x14x14``
"""

import argparse
from functools import partial

import torch
from harness import Case, compare, make_cases, parse_shape, parser
from torch import nn

from mmkw import SharingPlan, convert


class Layer(nn.Module):
    """A convolution among others of its kind, which only have a share in its warehouse.

    Args:
        args: Of the command line.
        budget: ``None`` for static convolutions.
    """

    def __init__(self, args: argparse.Namespace, budget: float | None) -> None:
        super().__init__()
        settings = dict(stride=args.stride, padding=args.kernel // 2, groups=args.groups)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*args.channels, args.kernel, bias=False, **settings)
            for _ in range(args.layers)
        )
        if budget is not None:
            plan = [(f'convolutions.{i}', 'all') for i in range(args.layers)]
            convert(self, SharingPlan.make(plan, cell_num_ratio=budget))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first of them."""
        return self.convolutions[0](x)


def main() -> None:
    """Reads the command line, measures and reports."""
    options = parser(__doc__)
    options.add_argument('--channels', type=int, nargs=2, default=[256, 256], help='in and out')
    options.add_argument('--kernel', type=int, default=3)
    options.add_argument('--stride', type=int, default=1)
    options.add_argument('--groups', type=int, default=1)
    options.add_argument('--layers', type=int, default=6, help='that share the warehouse')
    options.add_argument('--budgets', type=float, nargs='+', default=[1, 4])
    args = options.parse_args()

    def cases_of(shape: str, only: str | None) -> list[Case]:
        torch.manual_seed(0)
        batch, height, width = parse_shape(shape)
        x = torch.randn(batch, args.channels[0], height, width, requires_grad=True)
        variants = {'static': partial(Layer, args, None)}
        variants |= {f'kw {b:g}x': partial(Layer, args, b) for b in args.budgets}
        return make_cases(args, variants, lambda layer: layer(x).square().mean(), only)

    into, out = args.channels
    compare(f'{args.kernel}x{args.kernel}, {into} to {out} channels', args, cases_of)


if __name__ == '__main__':
    main()
