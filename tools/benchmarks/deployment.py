"""Times backbones in PyTorch, compiled, and as files in ONNX Runtime and OpenVINO, in one run.

The static and the dynamic network, in turns:
``deployment.py R18 --budget 1 --shapes 1x160x160 4x160x160``. Needs the extra ``deploy``; OpenVINO
is timed where it is installed. A static twin computes as the static network does.

``--parts`` also times, in ONNX Runtime, the products that mix the kernels, and the static network
with kernels that the runtime cannot lay out beforehand since they are not constant.
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
from mmkw.layers.dynamic_layers import ConvNd

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


class Mixing(nn.Module):
    """The products of attentions and cells alone, one a layer.

    Args:
        network: A dynamic network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.layers = [layer for layer in network.modules() if isinstance(layer, ConvNd)]

    def example(self, batch: int) -> Tensor:
        """Attentions for the largest layer; the others take a part of them."""
        mixtures = max(layer.share.num_mixtures for layer in self.layers)
        return torch.rand(batch, mixtures, max(len(layer.cells) for layer in self.layers))

    def forward(self, attention: Tensor) -> list[Tensor]:
        """One value of every mixture of every layer, so that the results need no copies."""
        return [
            (attention[:, : layer.share.num_mixtures, : len(layer.cells)] @ layer.cells.flatten(1))[
                ..., 0
            ]
            for layer in self.layers
        ]


def with_computed_kernels(path: Path) -> Path:
    """A copy of a file whose kernels might be computed: a runtime may not prepare them."""
    import onnx

    model = onnx.load(path)
    kernels = {node.input[1] for node in model.graph.node if node.op_type == 'Conv'}
    for tensor in model.graph.initializer:
        if tensor.name in kernels:
            # What is an input as well is a default, and no constant.
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    copied = path.with_name(f'computed_{path.name}')
    onnx.save(model, copied)
    return copied


def parts_of(network: nn.Module, static: Path, half: bool) -> dict[str, Callable[[Tensor], object]]:
    """Parts of what a dynamic network takes, as functions of images, in ONNX Runtime.

    Args:
        network: The dynamic network.
        static: The file of the static one.
        half: Whether files are in half precision.
    """
    mixing, path = Mixing(network), static.with_name('mixing.onnx')
    export(mixing, mixing.example(1), path, dynamic=('batch',), half=half)
    mix, convolve = (
        onnx_session(file, torch.get_num_threads())[0]
        for file in (path, with_computed_kernels(static))
    )
    return {'mixing': lambda x: mix(mixing.example(len(x))), 'kernels not constant': convolve}


def main() -> None:
    """Reads the command line, writes the files, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('backbone', choices=BACKBONES)
    parser.add_argument('--budget', type=float, default=1)
    parser.add_argument('--shapes', nargs='+', default=['1x160x160', '4x160x160'])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--form', default='scan', choices=('scan', 'matmul'), help='of the file')
    parser.add_argument('--half', action='store_true', help='files in half precision')
    parser.add_argument('--parts', action='store_true', help='of what is dynamic, too')
    parser.add_argument('--runtimes', nargs='+', default=RUNTIMES, choices=RUNTIMES)
    args = parser.parse_args()
    runtimes = [name for name in args.runtimes if name != 'OpenVINO' or find_spec('openvino')]
    torch.manual_seed(0)
    runs: dict[str, dict[str, Callable]] = {}
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
        if args.parts:
            parts = parts_of(network, Path(folder, 'static.onnx'), args.half)
            runs |= {name: {'ONNX Runtime': part} for name, part in parts.items()}
        print(f'{args.backbone}, kw {args.budget:g}x, {processor()}')
        columns = ['images', 'runtime', 'static ms']
        columns += [f'{name} ms | ratio' for name in runs if name != 'static']
        print(f'| {" | ".join(columns)} |\n{"|---" * (2 * len(runs) + 1)}|')
        for shape in args.shapes:
            batch, height, width = parse_shape(shape)
            x = torch.randn(batch, 3, height, width)
            for runtime in runtimes:
                found = medians(
                    {name: run[runtime] for name, run in runs.items() if runtime in run},
                    x,
                    args.repeats,
                )
                static = found.pop('static')
                cells = [f'{ms:.1f} | {ms / static:.2f}' for ms in found.values()]
                print(f'| {shape} | {runtime} | {static:.1f} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
