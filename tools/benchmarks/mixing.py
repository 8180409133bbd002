"""Times the compiled kernel that mixes the cells of a warehouse, for one image.

``mixing.py --cells 552x256x256 188x512x512 --mixtures 1 4 9 --precisions float32 bfloat16 int8``

*panels* are cells of float32 that are packed in bfloat16, as where they learn under autocast.
"""

import argparse
import itertools
import time
from functools import partial

import torch
from harness import least, machine, parse_shape, processor

from mmkw.ops.compiled import MISSING, multiplies_bfloat16, pack_cells


def main() -> None:
    """Reads the command line, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--cells',
        nargs='+',
        default=['552x256x256'],
        help='number x out x in, of kernels of size one',
    )
    parser.add_argument('--mixtures', type=int, nargs='+', default=[4], help='of a kernel')
    precisions = ('float32', 'bfloat16', 'int8')
    parser.add_argument(
        '--precisions', nargs='+', choices=(*precisions, 'panels'), default=precisions
    )
    parser.add_argument('--repeats', type=int, default=12)
    args = parser.parse_args()
    if MISSING is not None:
        raise SystemExit(f'Compiled kernels are missing: {MISSING}')
    reading = machine(time.perf_counter)['bandwidth'] / 1e9
    print(f'{processor()}, reads {reading:.0f} GB/s\n')
    print('| cells | mixtures | stored in | ms, least | GB/s |')
    print('|---|---|---|---|---|')
    for cells, mixtures in itertools.product(args.cells, args.mixtures):
        for precision in args.precisions:
            seconds, size = timed(cells, mixtures, precision, args.repeats)
            speed = f'{seconds * 1e3:.2f} | {size / seconds / 1e9:.0f}'
            print(f'| {cells} | {mixtures} | {precision} | {speed} |')


def timed(cells: str, mixtures: int, precision: str, repeats: int) -> tuple[float, int]:
    """The least time of mixing a kernel, in seconds, and the bytes of its warehouse."""
    torch.manual_seed(0)
    number, out, into = parse_shape(cells)
    in_panels = precision == 'panels'
    dtype = torch.float32 if in_panels else getattr(torch, precision)
    warehouse = torch.randint(-9, 9, (number, out, into, 1, 1)).to(dtype)
    attention = torch.randn(1, mixtures, number)
    if in_panels and not multiplies_bfloat16(warehouse):
        raise SystemExit('This processor does not multiply such cells in bfloat16.')
    panels = pack_cells(warehouse) if in_panels else None
    read = warehouse if panels is None else panels
    stored = torch.float32 if precision == 'int8' else read.dtype
    kernels = torch.empty(1, mixtures * out, into, 1, 1, dtype=stored)
    grid = (1, 1, mixtures, 1)
    mix = partial(torch.ops.mmkw.mix_cells_into, attention, warehouse, grid, kernels, panels)
    return least([mix], repeats)[0], warehouse.numel() * read.element_size()


if __name__ == '__main__':
    main()
