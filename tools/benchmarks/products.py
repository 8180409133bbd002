"""Times kernels of size one on an image: by tiles of our own, and by PyTorch.

Also where the channels of the image lie last.

``products.py --part kernels --sizes 64x256x160 512x128x80``: output and input channels, and the
image's side.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import least, machine, parse_shape, processor
from torch import Tensor

from mmkw.ops.compiled import MISSING

PARTS = 'forward', 'x', 'kernels'
WAYS = 'by tiles', 'torch.bmm', 'convolution'
COLUMNS = *WAYS, *(f'channels last, {way}' for way in WAYS)


def main() -> None:
    """Reads the command line, measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--sizes',
        nargs='+',
        default=['64x256x160', '256x64x160', '128x512x80', '1024x256x40', '512x2048x20'],
        help='output channels x input channels x side of the image',
    )
    parser.add_argument(
        '--part',
        choices=PARTS,
        default='forward',
        help='the result, the gradient of the image, or that of the kernel',
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
            for seconds in timed(args.part, out, into, side, args.repeats)
        )
        print(f'| {size} |' + ''.join(columns))


def timed(part: str, out: int, into: int, side: int, repeats: int) -> list[float]:
    """The least time of each way, in seconds; they take turns."""
    torch.manual_seed(0)
    kernel = torch.randn(1, out, into)
    image, grad = torch.randn(1, into, side, side), torch.randn(1, out, side, side)
    ways: list[Callable[[], Tensor]] = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, of_y = (t.contiguous(memory_format=memory_format) for t in (image, grad))
        left, right = factors(part, kernel, x, of_y)
        ways += [
            partial(torch.ops.mmkw.bmm, left, right, True),
            partial(torch.bmm, left, right),
            partial(convolved, part, kernel.view(out, into, 1, 1), x, of_y),
        ]
    return least(ways, repeats)


def factors(part: str, kernel: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices whose product is a part, as they lie in memory."""
    if x.is_contiguous():
        x, grad = x.flatten(2), grad.flatten(2)
        return dict(forward=(kernel, x), x=(kernel.mT, grad), kernels=(grad, x.mT))[part]
    x, grad = (t.movedim(1, -1).flatten(1, 2) for t in (x, grad))
    return dict(forward=(x, kernel.mT), x=(grad, kernel), kernels=(grad.mT, x))[part]


def convolved(part: str, kernel: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """The same by PyTorch's convolution."""
    if part == 'forward':
        return F.conv2d(x, kernel)
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    mask = [part == 'x', part == 'kernels', False]
    found = torch.ops.aten.convolution_backward(grad, x, kernel, None, *settings, mask)
    return found[mask.index(True)]


if __name__ == '__main__':
    main()
