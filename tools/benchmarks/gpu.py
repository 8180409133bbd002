"""Checks and times dynamic networks on a GPU, with PyTorch and this repository alone.

``tools/benchmarks/gpu.sh`` runs it: every path against float64, then the tables of
docs/performance.md, a JSON and a plot. Without a GPU it does the same on the CPU, for small images.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import Case, calibrate, mixing_limit, processor
from networks import NETWORKS
from published_form import published_form
from torch import Tensor, nn

import mmkw
from mmkw.ops import choosing
from mmkw.ops.modes import BATCH_NORM

BUDGETS = (1, 4)
# The precision of the weights' products, and that of autocast.
PRECISIONS = {
    'float16': torch.float16,
    'float32': None,
    'tf32': None,
    'bfloat16': torch.bfloat16,
}
SETTINGS = {
    'cuda': (
        ('train', (2, 800, 1216)),
        ('inference', (1, 224, 224)),
        ('inference', (64, 224, 224)),
        ('train', (32, 224, 224)),
        ('inference', (2, 800, 1216)),
        ('inference', (8, 224, 224)),
        ('inference', (1, 800, 1216)),
    ),
    'cpu': (('train', (2, 64, 64)), ('inference', (1, 64, 64))),
}
# Relative errors of layers that are right, beside float64.
ROUNDING = {'float32': 1e-5, 'tf32': 5e-3, 'float16': 5e-3, 'bfloat16': 2e-2}
# Gradients through an attention jump where a logit changes its sign.
ROUNDING_THROUGH_ATTENTION = 20


@dataclass(frozen=True)
class Row:
    """A line of the report.

    Args:
        setting: Mode, shape and precision.
        name: ``static``, ``kw 1x`` or ``published kw 1x``.
        median: Milliseconds of a step, as a training loop runs it.
        low: The shortest.
        high: The longest.
        ratio: ``median`` relative to the static network.
        graph: Milliseconds of a step that is replayed as a CUDA graph: the GPU's time alone.
        graph_ratio: ``graph`` relative to the static network.
        limit: What the ratio of the graphs is at least, by measured bandwidth and arithmetic.
        memory: Peak megabytes.
        launches: Kernels that a step starts.
    """

    setting: str
    name: str
    median: float
    low: float
    high: float
    ratio: float
    graph: float | None
    graph_ratio: float | None
    limit: float | None
    memory: float | None
    launches: int | None


@contextmanager
def in_precision(name: str, device: str) -> Iterator[AbstractContextManager]:
    """Sets TF32, and gives the context in which a network computes."""
    modules = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = name == 'tf32'
    dtype = PRECISIONS[name]
    try:
        yield nullcontext() if dtype is None else torch.autocast(device, dtype)
    finally:
        for module, value in zip(modules, before):
            module.allow_tf32 = value


def errors_of_layers(device: str, precision: str) -> dict[str, float]:
    """The largest relative error of every kind of layer, in outputs and gradients.

    Errors of gradients through the attention are divided by ``ROUNDING_THROUGH_ATTENTION``.

    Args:
        device: Such as ``cuda``.
        precision: One of ``PRECISIONS``.
    """
    torch.manual_seed(0)
    layers = {
        '3x3': (mmkw.KWConv2d(64, 96, 3, padding=1), (64, 17, 19)),
        '3x3, stride 2': (mmkw.KWConv2d(64, 96, 3, 2, 1), (64, 17, 19)),
        '3x3, groups': (mmkw.KWConv2d(64, 96, 3, padding=1, groups=2), (64, 17, 19)),
        'depthwise': (mmkw.KWConv2d(64, 64, 7, padding=3, groups=64), (64, 17, 19)),
        '1x1': (mmkw.KWConv2d(64, 96, 1, cell_num_ratio=4), (64, 17, 19)),
        'linear': (mmkw.KWLinear(64, 96), (20, 64)),
        'DY-Conv': (mmkw.DYConv2d(64, 96, 3, padding=1), (64, 17, 19)),
        'CondConv': (mmkw.CondConv2d(64, 96, 3, padding=1), (64, 17, 19)),
        'ODConv': (mmkw.ODConv2d(64, 96, 3, padding=1, cell_num_ratio=4), (64, 17, 19)),
    }
    errors = {}
    for name, (layer, shape) in layers.items():
        for batch in (1, 2, 16):
            for norm in layer.attention.children():
                if isinstance(norm, BATCH_NORM):
                    norm.eval()
            x = torch.randn(batch, *shape)
            exact = _results(copy.deepcopy(layer).double(), x.double(), nullcontext())
            with in_precision(precision, device) as context:
                found = _results(copy.deepcopy(layer).to(device), x.to(device), context)
            factors = (1, 1, ROUNDING_THROUGH_ATTENTION, ROUNDING_THROUGH_ATTENTION)
            for a, b, factor in zip(found, exact, factors):
                error = ((a - b).norm() / b.norm()).item() / factor
                errors[name] = max(errors.get(name, 0), error)
    return errors


def _results(layer: nn.Module, x: Tensor, context: AbstractContextManager) -> list[Tensor]:
    x = x.requires_grad_()
    with context:
        y = layer(x)
    y.double().sin().sum().backward()
    last = [module for module in layer.attention.children() if isinstance(module, nn.Linear)][-1]
    tensors = [y, layer.warehouse_manager.weights[0].grad, x.grad, last.weight.grad]
    return [tensor.detach().double().cpu() for tensor in tensors]


def speeds(device: str, precisions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bytes a second that copying moves, and operations a second of a product, by precision."""
    size = 8192 if device == 'cuda' else 512
    values = torch.empty(size * size * 4, device=device)
    target = torch.empty_like(values)
    bandwidth = 8 * values.numel() / _shortest(device, lambda: target.copy_(values))
    found = {}
    for precision in precisions:
        square = torch.randn(size, size, device=device).to(PRECISIONS[precision] or torch.float32)
        with in_precision(precision, device):
            seconds = _shortest(device, lambda: square @ square)  # noqa: B023
        found[precision] = dict(bandwidth=bandwidth, peak=2 * size**3 / seconds, bytes=4)
    return found


def _shortest(device: str, work: Callable[[], object]) -> float:
    return min(seconds_of(device, work) for _ in range(5))


def seconds_of(device: str, work: Callable[[], object]) -> float:
    """Times one call to its end."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: str) -> None:
    """Waits until the device has done its work."""
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds_of_graph(work: Callable[[], object]) -> float | None:
    """Seconds of a step as a CUDA graph; None if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return statistics.median(seconds_of('cuda', graph.replay) for _ in range(5))


def launches_of(work: Callable[[], object]) -> int:
    """Counts the kernels that a step starts."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda for event in profiler.events())


def networks_of(name: str) -> dict[str, nn.Module]:
    """Builds the static network and the dynamic ones that start as it.

    Args:
        name: One of ``NETWORKS``.
    """
    torch.manual_seed(0)
    static = NETWORKS[name]()
    return {'static': static} | {
        f'kw {budget}x': mmkw.convert(copy.deepcopy(static), cell_num_ratio=budget)
        for budget in BUDGETS
    }


def measure(
    networks: dict[str, nn.Module],
    mode: str,
    shape: tuple[int, ...],
    precision: str,
    device: str,
    speed: dict,
) -> list[Row]:
    """Measures the static network and the dynamic ones, also in the published form.

    Args:
        networks: Of :func:`networks_of`.
        mode: ``train`` or ``inference``.
        shape: Batch, height and width.
        precision: One of ``PRECISIONS``.
        device: Such as ``cuda``.
        speed: Of :func:`speeds`, for the precision.
    """
    batch, *size = shape
    setting = f'{mode} {"x".join(map(str, shape))} {precision}'
    x = torch.randn(batch, 3, *size, device=device)
    rows: list[dict] = []
    for case, network in networks.items():
        network.to(device).train(mode == 'train')
        forms = {case: nullcontext}
        if case != 'static':
            forms[f'published {case}'] = published_form
        for form_name, form in forms.items():
            row = _measure_one(form_name, network, form, x, mode, precision, device)
            if row is None:
                continue
            limit = None
            if case != 'static':
                reference = rows[0]
                base = reference['graph'] or reference['median']
                limit = 1 + 1e3 * mixing_limit(network, batch, mode == 'train', speed) / base
            row['limit'] = limit
            rows.append(row)
        network.cpu()
    first = rows[0]
    return [
        Row(
            setting=setting,
            ratio=row['median'] / first['median'],
            graph_ratio=row['graph'] / first['graph'] if row['graph'] and first['graph'] else None,
            **row,
        )
        for row in rows
    ]


def _measure_one(
    name: str,
    network: nn.Module,
    form: Callable[[], AbstractContextManager],
    x: Tensor,
    mode: str,
    precision: str,
    device: str,
) -> dict | None:
    train = mode == 'train'
    with in_precision(precision, device) as context, form():

        def step() -> None:
            with torch.set_grad_enabled(train):
                network.zero_grad(set_to_none=True)
                with context:
                    loss = network(x).square().mean()
                if train:
                    loss.backward()

        try:
            calibrate(Case(name, network, lambda: network(x)))
            for _ in range(2):
                step()
            synchronise(device)
            if device == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            seconds = [seconds_of(device, step) for _ in range(5)]
            memory = torch.cuda.max_memory_allocated() / 2**20 if device == 'cuda' else None
            graph = launches = None
            if device == 'cuda' and not name.startswith('published'):
                graph = seconds_of_graph(step)
                launches = launches_of(step) if precision == 'float16' else None
        except torch.OutOfMemoryError:
            print(f'{name}: out of memory')
            return None
        finally:
            network.zero_grad(set_to_none=True)
    return dict(
        name=name,
        median=1e3 * statistics.median(seconds),
        low=1e3 * min(seconds),
        high=1e3 * max(seconds),
        graph=graph and 1e3 * graph,
        memory=memory,
        launches=launches,
    )


def print_rows(rows: Sequence[Row]) -> None:
    """Prints lines of the table."""

    def number(value: float | None, digits: int = 2) -> str:
        return '' if value is None else f'{value:.{digits}f}'

    for row in rows:
        print(
            f'| {row.setting} | {row.name} | {row.median:.2f} | {row.ratio:.2f} '
            f'| {number(row.graph)} | {number(row.graph_ratio)} | {number(row.limit)} '
            f'| {number(row.memory, 0)} | {number(row.launches, 0)} |',
            flush=True,
        )


def table(
    network: str, precisions: Sequence[str], device: str, speed: dict, end: float
) -> list[Row]:
    """Measures and prints all settings of a network.

    Args:
        network: One of ``NETWORKS``.
        precisions: Of ``PRECISIONS``.
        device: Such as ``cuda``.
        speed: Of :func:`speeds`.
        end: When no new setting is begun, in seconds of ``time.perf_counter``.
    """
    columns = ('setting', 'form', 'ms', 'ratio', 'graph, ms', 'ratio', 'limit', 'peak MB')
    print(f'\n{network}\n\n| {" | ".join(columns)} | launches |')
    print('|---' * 9 + '|')
    rows: list[Row] = []
    networks = None
    for precision in precisions:
        for mode, shape in SETTINGS[device]:
            if time.perf_counter() > end:
                return rows
            networks = networks or networks_of(network)
            new = measure(networks, mode, shape, precision, device, speed[precision])
            print_rows(new)
            rows += new
    return rows


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws the ratios of the first precision: of CUDA graphs, or of steps where there are none.

    Args:
        rows: Of :func:`table`.
        title: Of the picture.
        path: The picture.
    """
    try:
        from drawing import draw_bars
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f'no picture: {error}')
        return
    precision = rows[0].setting.split()[-1]
    bars = [
        dict(
            setting='\n'.join(row.setting.split()[:2]),
            name=row.name,
            ratio=row.graph_ratio or row.ratio,
            limit=row.limit,
        )
        for row in rows
        if row.setting.split()[-1] == precision
        and row.name != 'static'
        and (row.graph_ratio or rows[0].graph is None)
    ]
    figure = Figure((3 + 0.45 * len(bars), 4.4), layout='constrained')
    axes = figure.subplots()
    axes.axhline(1, color='gray', linewidth=1, label='static')
    draw_bars(axes, bars)
    axes.set_ylabel('time relative to the static network')
    axes.set_title(f'{title}, {precision}', fontsize='small')
    figure.legend(loc='outside lower center', ncols=3, fontsize='small')
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the command line, checks, measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--device', default=device, choices=['cuda', 'cpu'])
    parser.add_argument('--minutes', type=float, default=18, help='then no new setting is begun')
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument('--precisions', nargs='+', default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument('--out', type=Path, default=Path('gpu'), help='prefix of what is written')
    args = parser.parse_args()
    begin, device = time.perf_counter(), args.device
    gpu = torch.cuda.get_device_name() if device == 'cuda' else None
    print(f'{gpu or processor()}, torch {torch.__version__}, mmkw {mmkw.__version__}\n')

    wrong = []
    print('| relative error | ' + ' | '.join(args.precisions) + ' |')
    print('|---|' + '---|' * len(args.precisions))
    errors = {name: errors_of_layers(device, name) for name in args.precisions}
    for layer in next(iter(errors.values())):
        found = {name: errors[name][layer] for name in args.precisions}
        wrong += [(layer, name) for name, error in found.items() if not error < ROUNDING[name]]
        print(f'| {layer} | ' + ' | '.join(f'{error:.1e}' for error in found.values()) + ' |')
    if wrong:
        raise SystemExit(f'wrong results: {wrong}')

    speed = speeds(device, args.precisions)
    bandwidth = speed[args.precisions[0]]['bandwidth']
    print(f'\nmoving {bandwidth / 1e9:.0f} GB/s; products, TFLOP/s:')
    print(', '.join(f'{name} {value["peak"] / 1e12:.1f}' for name, value in speed.items()) + '\n')
    content = {
        'title': f'{gpu or processor()}',
        'command': 'tools/benchmarks/gpu.sh',
        'torch': torch.__version__,
        'mmkw': mmkw.__version__,
        'device': device,
        'speeds': speed,
        'errors': errors,
    }
    for network in args.networks:
        rows = table(network, args.precisions, device, speed, begin + 60 * args.minutes)
        content[network] = [asdict(row) for row in rows]
        args.out.with_suffix('.json').write_text(json.dumps(content, indent=1))
        if rows:
            draw(rows, f'{network} on {gpu or processor()}', Path(f'{args.out}_{network}.png'))
    content['ways'] = sorted(f'{key}: {way}' for key, way in choosing.measured().items())
    args.out.with_suffix('.json').write_text(json.dumps(content, indent=1))
    print(f'\n{(time.perf_counter() - begin) / 60:.1f} minutes; written: {args.out}.json')


if __name__ == '__main__':
    main()
