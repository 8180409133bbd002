"""Times the product of an image with a kernel of size one: by tiles of our own, and by PyTorch.

Also by PyTorch where the channels of the image lie last.

``products.py --sizes 64x256x160 512x128x80``: output and input channels, and the image's side.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import least, machine, parse_shape, processor
from torch import Tensor

from mmkw.ops.compiled import MISSING

COLUMNS = (
    'by tiles',
    'torch.bmm',
    'F.conv2d',
    'channels last, torch.mm',
    'channels last, F.conv2d',
)


def main() -> None:
    """Reads the command line, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--sizes',
        nargs='+',
        default=['64x256x160', '256x64x160', '128x512x80', '1024x256x40', '512x2048x20'],
        help='output channels x input channels x side of the image',
    )
    parser.add_argument('--repeats', type=int, default=12)
    args = parser.parse_args()
    if MISSING is not None:
        raise SystemExit(f'Compiled kernels are missing: {MISSING}')
    speed = machine(time.perf_counter)['peak'] / 1e9
    print(f'{processor()}, a large square product: {speed:.0f} GFLOP/s\n')
    print('| out x in x side |' + ''.join(f' {name}, ms, least | GFLOP/s |' for name in COLUMNS))
    print('|---|' + '---|---|' * len(COLUMNS))
    for size in args.sizes:
        out, into, side = parse_shape(size)
        operations = 2 * out * into * side * side
        columns = (
            f' {seconds * 1e3:.2f} | {operations / seconds / 1e9:.0f} |'
            for seconds in timed(out, into, side, args.repeats)
        )
        print(f'| {size} |' + ''.join(columns))


def timed(out: int, into: int, side: int, repeats: int) -> list[float]:
    """The least time of each way, in seconds; they take turns."""
    torch.manual_seed(0)
    kernel, image = torch.randn(1, out, into), torch.randn(1, into, side, side)
    pixels = image.flatten(2)
    last = image.contiguous(memory_format=torch.channels_last)
    rows = last.movedim(1, -1).flatten(0, 2)
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.ops.mmkw.bmm(kernel, pixels, True),
        lambda: torch.bmm(kernel, pixels),
        lambda: F.conv2d(image, kernel.view(out, into, 1, 1)),
        lambda: torch.mm(rows, kernel[0].t()),
        lambda: F.conv2d(last, kernel.view(out, into, 1, 1)),
    ]
    return least(ways, repeats)


if __name__ == '__main__':
    main()
