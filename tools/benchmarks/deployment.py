"""Times exported backbones in ONNX Runtime and in PyTorch, static and dynamic, in one run.

``deployment.py R18 --budget 1 --shapes 1x160x160 4x160x160``. Needs the extra ``deploy``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from backbone import BACKBONES, build
from harness import parse_shape, processor

from mmkw.deploy import export


def session_of(path: Path) -> Callable[[torch.Tensor], list]:
    """What runs a file, with as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, ['CPUExecutionProvider'])
    return lambda x: session.run(None, {'images': x.numpy()})


def medians(runs: dict[str, Callable], x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of each, measured in turn.

    Several runs in a row, of which the first do not count: the threads of the one before are still
    waiting for work.
    """
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
    parser.add_argument('--form', default='scan', help='see mmkw.deploy.export')
    args = parser.parse_args()
    torch.manual_seed(0)
    files, networks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, budget in (('static', None), ('dynamic', args.budget)):
            path = Path(folder, f'{name}.onnx')
            networks[name] = network = build(args.backbone, budget)
            begin = time.perf_counter()
            parity = export(network, torch.rand(1, 3, 64, 64), path, form=args.form)
            took = time.perf_counter() - begin
            worst = max(found.difference for found in parity)
            size = path.stat().st_size / 1e6
            print(f'{name}: {size:.1f} MB, written in {took:.0f} s, differs by {worst:.1e}')
            files[name] = session_of(path)
            network.eval()
        print(f'{args.backbone}, kw {args.budget:g}x, {processor()}')
        print('| images | runtime | static ms | dynamic ms | ratio |\n|---|---|---|---|---|')
        with torch.no_grad():
            for shape in args.shapes:
                batch, height, width = parse_shape(shape)
                x = torch.randn(batch, 3, height, width)
                for runtime, runs in (('ONNX Runtime', files), ('PyTorch', networks)):
                    found = medians(runs, x, args.repeats)
                    static, dynamic = found['static'], found['dynamic']
                    print(
                        f'| {shape} | {runtime} | {static:.1f} | {dynamic:.1f} '
                        f'| {dynamic / static:.2f} |',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
