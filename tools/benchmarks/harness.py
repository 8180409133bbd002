"""What the benchmarks have in common: steps, interleaved timing, limits, peak memory, reports."""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from published_form import published_form
from torch import Tensor, nn

import mmkw
from mmkw.layers.dynamic_layers import DynamicLayer
from mmkw.layers.static_classes import explicit_padding
from mmkw.ops import modes, why_not_compiled
from mmkw.ops.ways import Geometry, Products


@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Args:
        name: Such as ``static``, ``kw 4x`` or ``published kw 4x``.
        model: What computes.
        run: Computes outputs (inference) or a loss (training) by it.
        form: Where it works, such as :func:`published_form`.
    """

    name: str
    model: nn.Module
    run: Callable[[], object]
    form: Callable[[], AbstractContextManager] = nullcontext

    def step(self, train: bool) -> None:
        """One inference, or one forward and backward pass from gradients of None."""
        with self.form():
            if train:
                self.model.zero_grad(set_to_none=True)
                self.run().backward()
            else:
                with torch.no_grad():
                    self.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Row:
    """A line of a report: times in milliseconds, memory in megabytes, both of a whole step."""

    setting: str
    name: str
    median: float
    low: float
    high: float
    ratio: float
    limit: float | None
    memory: float | None


@contextmanager
def products() -> Iterator[None]:
    """Has static convolutions of size one compute as products of matrices, which dynamic ones may.

    On some processors this is faster than a convolution. What convolving takes at least is the
    shorter of both.
    """
    theirs = nn.Conv2d._conv_forward

    def conv_forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_product(self):
            return theirs(self, x, weight, bias)
        conv = Geometry(self.stride, self.padding, self.dilation, self.groups)
        return Products.forward(conv, x, weight.expand(len(x), *weight.shape), bias)

    nn.Conv2d._conv_forward = conv_forward
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = theirs


def _is_product(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or any(explicit_padding(module)):
        return False
    return module.kernel_size == (1, 1)


def calibrate(case: Case) -> None:
    """Gives the norms of random weights the statistics of the case's own input.

    Under the statistics they start with, activations vanish from layer to layer, until the
    processor computes with denormal numbers, at a fraction of its speed.
    """
    norms = [m for m in case.model.modules() if isinstance(m, modes.BATCH_NORM)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    case.step(False)
    for norm, (momentum, training) in zip(norms, before):
        norm.momentum = momentum
        norm.train(training)


def timed(
    cases: Sequence[Case],
    train: bool,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Times cases in turns, so that what slows the machine for a while meets all of them.

    Every timed step follows an untimed one of the same case: what a step frees, the system may take
    back while another case runs, and to hand it out again would count as the next step's.

    Args:
        cases: Names are unique.
        train: Whether a step is a training step.
        repeats: Timed steps of every case.
        clock: Gives seconds.

    Returns:
        Seconds of every timed step.
    """
    for case in cases:
        case.model.train(train)
        calibrate(case)
        case.step(train)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            case.step(train)
            begin = clock()
            case.step(train)
            seconds[case.name].append(clock() - begin)
    return seconds


def machine(clock: Callable[[], float], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Measured bandwidth of reading (bytes/s) and speed of a product of matrices (operations/s).

    The product is one of squares, by PyTorch's library for products or by that for convolutions: on
    some processors one of them is far slower.

    Args:
        clock: Gives seconds.
        dtype: Of the matrices, whose numbers have so many ``bytes``.
    """
    values, square = torch.ones(200_000_000), torch.randn(2048, 2048).to(dtype)
    image, kernel = square.view(1, 2048, 32, 64), square.view(2048, 2048, 1, 1)
    works = [lambda: torch.mm(square, square), lambda: F.conv2d(image, kernel)]
    return {
        'bandwidth': values.numel() * 4 / least([values.sum], 7, clock)[0],
        'peak': 2 * 2048**3 / min(least(works, 7, clock)),
        'bytes': dtype.itemsize,
    }


def least(
    works: Sequence[Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The least time of each piece of work, in seconds; they take turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            begin = clock()
            work()
            found.append(clock() - begin)
    return [min(found) for found in times]


def processor() -> str:
    """The processor's name, and the instructions that PyTorch uses: names tell no generation."""
    try:
        names = re.findall(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def mixing_limit(model: nn.Module, batch: int, train: bool, speed: dict[str, float]) -> float:
    """Seconds that mixing takes at least: reading the warehouses or computing, whichever is longer.

    Inference reads a layer's warehouse once and computes one product. A training step reads it
    twice, computes three products (mixture, gradients of attentions and of cells), and writes the
    gradient of every warehouse once.

    Args:
        model: With dynamic layers.
        batch: Images.
        train: Whether it is a training step.
        speed: Of :func:`machine`.
    """
    layers = [m for m in model.modules() if isinstance(m, DynamicLayer)]
    read = speed['bytes'] * sum(layer.cells.numel() for layer in layers)
    products = sum(layer.share.num_mixtures * layer.cells.numel() for layer in layers)
    written = 4 * sum(cells.numel() for cells in {layer.cells for layer in layers})
    if train:
        read, products = 2 * read + written, 3 * products
    return max(read / speed['bandwidth'], 2 * batch * products / speed['peak'])


def make_cases(
    args: argparse.Namespace,
    variants: Mapping[str, Callable[[], nn.Module]],
    run: Callable[[nn.Module], object],
    only: str | None = None,
) -> list[Case]:
    """Builds the networks to compare.

    Static ones are timed once more with :func:`products`, and with ``--published`` the dynamic ones
    in the :func:`published_form`.

    Args:
        args: Of :func:`parser`.
        variants: What builds the network of each name, the static one first.
        run: Computes by a network.
        only: The case to make, where a single one is wanted.
    """
    cases = []
    for name, build in variants.items():
        published, by_products = f'published {name}', f'{name} by products'
        if only not in (None, name, published, by_products):
            continue
        model = build()
        forms = {name: nullcontext}
        if any(isinstance(module, DynamicLayer) for module in model.modules()):
            if args.published:
                forms[published] = published_form
        elif any(map(_is_product, model.modules())):
            forms[by_products] = products
        cases += [
            Case(form, model, partial(run, model), forms[form])
            for form in forms
            if only in (None, form)
        ]
    return cases


def compare(
    title: str,
    args: argparse.Namespace,
    cases_of: Callable[[str, str | None], list[Case]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Measures every setting and reports, or does what :func:`peak_memory` asks for.

    Args:
        title: What is measured.
        args: Of :func:`parser`, with ``shapes`` such as ``8x224x224``.
        cases_of: Makes the cases of a shape, or the one of them that is named.
        dtype: In which cells are read and multiplied at best, for the limit.
    """
    if args.peak_of:
        print_peak(*cases_of(*args.peak_of))
        return
    if args.processor_time and torch.get_num_threads() > 1:
        raise SystemExit('--processor-time adds up threads; run with OMP_NUM_THREADS=1')
    speed, rows = machine(clock_of(args), dtype), []
    for shape in args.shapes:
        rows += measure(shape, cases_of(shape, None), parse_shape(shape)[0], args, speed)
    report(title, rows, args, speed)


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that a command line asks for."""
    return time.process_time if args.processor_time else time.perf_counter


def parse_shape(shape: str) -> tuple[int, int, int]:
    """Batch, height and width of ``8x224x224``."""
    batch, height, width = map(int, shape.split('x'))
    return batch, height, width


def measure(
    setting: str, cases: Sequence[Case], batch: int, args: argparse.Namespace, speed: dict
) -> list[Row]:
    """Times cases against the static one, the first.

    The limit of a dynamic network is what convolving takes at least, in either form of the static
    network, and what mixing does.

    Args:
        setting: Name of the lines in the report.
        cases: The first is the reference.
        batch: Images of a step.
        args: Of :func:`parser`.
        speed: Of :func:`machine`.
    """
    train = args.mode == 'train'
    seconds = timed(cases, train, args.repeats, clock_of(args))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians[cases[0].name]
    convolving = min(medians[case.name] for case in cases if case.model is cases[0].model)
    rows = []
    for case in cases:
        values = seconds[case.name]
        median = medians[case.name]
        dynamic = any(isinstance(module, DynamicLayer) for module in case.model.modules())
        limit = mixing_limit(case.model, batch, train, speed) if dynamic else None
        rows.append(
            Row(
                setting,
                case.name,
                1e3 * median,
                1e3 * min(values),
                1e3 * max(values),
                median / reference,
                limit and (convolving + limit) / reference,
                peak_memory(setting, case.name) if train and args.memory else None,
            )
        )
    return rows


def peak_memory(setting: str, name: str) -> float:
    """Peak resident megabytes of a process that makes three training steps of one case only."""
    command = [sys.executable, *sys.argv, '--peak-of', setting, name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1])


def print_peak(case: Case) -> None:
    """What the process started by :func:`peak_memory` does."""
    case.model.train()
    calibrate(case)
    for _ in range(3):
        case.step(True)
    # Not ru_maxrss: a process inherits it from the one that started it.
    status = Path('/proc/self/status').read_text()
    print(int(status.split('VmHWM:')[1].split()[0]) / 1024)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    shared = argparse.ArgumentParser(description=description)
    shared.add_argument('--mode', choices=['inference', 'train'], default='inference')
    shared.add_argument('--shapes', nargs='+', default=['1x224x224'], help='BATCHxHEIGHTxWIDTH')
    shared.add_argument('--repeats', type=int, default=5, help='timed steps of every case')
    shared.add_argument('--published', action='store_true', help='the published form as well')
    shared.add_argument(
        '--memory', action='store_true', help='peak memory of a training step as well (Linux)'
    )
    shared.add_argument(
        '--processor-time',
        action='store_true',
        help='time of one thread on its processor, for a machine on which others work, too',
    )
    shared.add_argument('--out', type=Path, help='prefix of a .json and a .png to write')
    shared.add_argument('--peak-of', nargs=2, help=argparse.SUPPRESS)
    return shared


def report(title: str, rows: Sequence[Row], args: argparse.Namespace, speed: dict) -> None:
    """Prints a table; writes it as JSON and draws it where ``--out`` says.

    Args:
        title: What was measured.
        rows: Of :func:`measure`.
        args: Of :func:`parser`.
        speed: Of :func:`machine`.
    """
    about = {
        'title': f'{title}, {args.mode}',
        'command': ' '.join(['python', *sys.argv]),
        'torch': torch.__version__,
        'mmkw': mmkw.__version__,
        'compiled kernels': why_not_compiled() is None,
        'processor': processor(),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'threads': torch.get_num_threads(),
        'processor time': args.processor_time,
        **speed,
    }
    print(
        f'\n{about["title"]}; {about["threads"]} threads of {about["processor"]} '
        f'({about["instructions"]}),'
    )
    print(
        f'reading {speed["bandwidth"] / 1e9:.0f} GB/s, computing {speed["peak"] / 1e9:.0f} '
        f'GFLOP/s, {args.repeats} repetitions\n'
    )
    print('| setting | network | ms | from - to | ratio | limit | peak MB |')
    print('|---|---|---|---|---|---|---|')
    for row in rows:
        limit = '' if row.limit is None else f'{row.limit:.2f}'
        memory = '' if row.memory is None else f'{row.memory:.0f}'
        print(
            f'| {row.setting} | {row.name} | {row.median:.1f} | {row.low:.1f} - {row.high:.1f} '
            f'| {row.ratio:.2f} | {limit} | {memory} |'
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {**about, 'rows': [asdict(row) for row in rows]}
        args.out.with_suffix('.json').write_text(json.dumps(content, indent=1))
        # The other outputs do not need matplotlib.
        from drawing import draw

        draw(content).savefig(args.out.with_suffix('.png'), dpi=110)
