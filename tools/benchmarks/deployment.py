"""Times backbones in PyTorch, compiled, and as files in ONNX Runtime and OpenVINO, in one run.

The static and the dynamic network, in turns:
``deployment.py R18 --budget 1 --shapes 1x160x160 4x160x160``. Needs the extra ``deploy``; OpenVINO
is timed where it is installed. A static twin computes as the static network does.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from backbone import BACKBONES, build
from harness import parse_shape, processor
from torch import Tensor, nn

from mmkw.deploy import export
from mmkw.deploy.runtimes import onnx_session

RUNTIMES = ('eager', 'compiled', 'ONNX Runtime', 'OpenVINO')


def openvino_network(path: Path) -> Callable[[Tensor], object]:
    """What runs a file in OpenVINO, in float32, with as many threads as PyTorch has."""
    import openvino

    settings = {
        'INFERENCE_PRECISION_HINT': 'f32',
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
    }
    network = openvino.Core().compile_model(path, 'CPU', settings)
    return lambda x: network(x.numpy())


def runs_of(
    network: nn.Module, path: Path, runtimes: Sequence[str]
) -> dict[str, Callable[[Tensor], object]]:
    """A network in each runtime, as functions of images."""
    network.eval()
    makers: dict[str, Callable[[], Callable]] = {
        'eager': lambda: network,
        'compiled': lambda: torch.compile(network, dynamic=False),
        'ONNX Runtime': lambda: onnx_session(path, torch.get_num_threads())[0],
        'OpenVINO': lambda: openvino_network(path),
    }
    return {name: makers[name]() for name in runtimes}


def medians(
    runs: Mapping[str, Callable[[Tensor], object]], x: Tensor, repeats: int
) -> dict[str, float]:
    """Milliseconds of each, measured in turn.

    Several runs in a row, of which the first do not count: the threads of the one before are still
    waiting for work.
    """
    for run in runs.values():
        run(x)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(0.1)
            for number in range(5):
                begin = time.perf_counter()
                run(x)
                if number >= 2:
                    seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Reads the command line, writes the files, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('backbone', choices=BACKBONES)
    parser.add_argument('--budget', type=float, default=1)
    parser.add_argument('--shapes', nargs='+', default=['1x160x160', '4x160x160'])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--form', default='scan', choices=('scan', 'matmul'), help='of the file')
    parser.add_argument('--half', action='store_true', help='files in half precision')
    parser.add_argument('--runtimes', nargs='+', default=RUNTIMES, choices=RUNTIMES)
    args = parser.parse_args()
    runtimes = [name for name in args.runtimes if name != 'OpenVINO' or find_spec('openvino')]
    torch.manual_seed(0)
    runs = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, budget in (('static', None), ('dynamic', args.budget)):
            path = Path(folder, f'{name}.onnx')
            network = build(args.backbone, budget)
            begin = time.perf_counter()
            image = torch.rand(1, 3, 64, 64)
            parity = export(network, image, path, form=args.form, half=args.half)
            took = time.perf_counter() - begin
            worst = max(found.difference for found in parity)
            size = path.stat().st_size / 1e6
            print(f'{name}: {size:.1f} MB, written in {took:.0f} s, differs by {worst:.1e}')
            runs[name] = runs_of(network, path, runtimes)
        print(f'{args.backbone}, kw {args.budget:g}x, {processor()}')
        print('| images | runtime | static ms | dynamic ms | ratio |\n|---|---|---|---|---|')
        for shape in args.shapes:
            batch, height, width = parse_shape(shape)
            x = torch.randn(batch, 3, height, width)
            for runtime in runtimes:
                found = medians({name: run[runtime] for name, run in runs.items()}, x, args.repeats)
                static, dynamic = found['static'], found['dynamic']
                print(
                    f'| {shape} | {runtime} | {static:.1f} | {dynamic:.1f} '
                    f'| {dynamic / static:.2f} |',
                    flush=True,
                )


if __name__ == '__main__':
    main()
