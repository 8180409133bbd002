"""Writes a network to a file, and compares what the file computes with the network."""

import copy
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import exported
from .networks import DenseNetwork, difference, evaluating, tensors_of
from .runtimes import need, onnx_session
from .static import to_static
from .windows import counted_in_program, windowed

LOGGER = logging.getLogger('mmkw')

FORMS = ('scan', 'matmul', 'static')
DYNAMIC = ('batch', 'size')
BATCHES = (1, 2, 3, 5, 8)
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05
# Pixels that are added to the sides of the example, of two-dimensional images height and width.
# Multiples of 64, since most networks halve images up to six times.
GROWTHS = ((64, 0), (128, 64))


class ExportError(RuntimeError):
    """A network cannot be exported as asked, or the file computes something else."""


class Parity(NamedTuple):
    """How a file computes images of one shape.

    Attributes:
        shape: Of the images.
        difference: The largest difference of a value from the network's, relative to the largest
            magnitude in this output.
        seconds: Of the file, and of the network in PyTorch.
    """

    shape: tuple[int, ...]
    difference: float
    seconds: tuple[float, float]


def export(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    dynamic: Sequence[str] = DYNAMIC,
    form: str = 'scan',
    tolerance: float | None = None,
    half: bool = False,
    loader: Iterable[Any] | None = None,
    keep: str | Collection[str] = (),
) -> list[Parity]:
    """Writes a network to one file for any batch and any size of image, and checks the file.

    An ``.onnx`` file is checked by ``onnx`` and run in ONNX Runtime. A ``.pt2`` file is a program
    of ``torch.export`` and run in PyTorch. Both hold the network in evaluation mode, at its current
    temperature and in its precision or in half precision. They are compared with the network at
    several batches and sizes.

    Args:
        model: A network, a layer, or any module that maps one tensor to tensors (or to lists and
            tuples of tensors).
        example: ``Tensor[batch, channels, *size]``, images as the network gets them; one is enough.
            Of Tensor[batch, ..., features] for a linear layer the batch alone may be dynamic.
        path: Where to write, ``*.onnx`` or ``*.pt2``.
        dynamic: What may differ from the example: ``'batch'``, ``'size'``, both or nothing.
        form: How convolutions are written. ``'scan'`` convolves large maps image by image, in a
            loop. ``'matmul'`` has matrix products only, for runtimes that refuse loops or
            convolutions with computed kernels; it takes more memory. ``'static'`` writes the static
            network of :func:`~mmkw.deploy.to_static`, and compares the file with that; what it
            loses is logged. Layers to keep are written as by ``'scan'``.
        tolerance: The largest relative difference that is accepted; by default 1e-4; if the
            network or the file computes in half precision, 0.05.
        half: Whether the file computes in float16, with half the size. Its images and outputs stay
            of float32.
        loader: For ``form='static'`` the images, as in :func:`~mmkw.deploy.to_static`.
        keep: For ``form='static'`` the layers that stay dynamic, as there.

    Returns:
        What was compared, one entry a shape.

    Raises:
        ExportError: If the network cannot be exported, if what should be dynamic cannot be, or if
            the file does not compute what the network does. The file is then not left behind.
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If ``.onnx`` is asked for without the extra ``deploy``.

    Example:
        >>> network, image = mmkw.KWConv2d(8, 16, 3, padding=1), torch.rand(1, 8, 32, 32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     parity = mmkw.deploy.export(network, image, f'{folder}/network.pt2')
        >>> max(found.difference for found in parity) < 1e-4
        True
    """
    path = Path(path)
    _check(model, example, path, dynamic, form)
    if 'size' in dynamic and windowed(model):
        # PyTorch 2.13 works on such a program for more than ten minutes.
        raise ExportError(
            f'{type(model).__name__} cannot be exported with dynamic={tuple(dynamic)}: it cuts '
            "images into windows, whose number must be known. Try dynamic=('batch',)."
        )
    if (form == 'static') != (loader is not None) or (keep and form != 'static'):
        raise ValueError(f"form='static' takes a loader, and keep; other forms do not: {form!r}.")
    if loader is not None:
        model, report = to_static(model, loader, keep)
        LOGGER.info(str(report))
        form = 'scan'
    write = _write_onnx if path.suffix == '.onnx' else _write_program
    if 'batch' in dynamic and len(example) == 1:
        # PyTorch takes a size of one for a constant.
        example = example.repeat(2, *[1] * (example.dim() - 1))
    if tolerance is None:
        precise = all(p.dtype.itemsize > 2 for p in model.parameters() if p.is_floating_point())
        tolerance = TOLERANCE if precise and not half else HALF_TOLERANCE
    written = _Half(model) if half else model
    with _as_exported(form), counted_in_program(written), evaluating(model, written):
        _check_computes(written, example)
        program = _program(written, example, dynamic)
        unfinished = path.with_name(f'{path.stem}.{os.getpid()}.part{path.suffix}')
        try:
            run = write(program, unfinished)
            parity = list(_compared(model, run, example, dynamic))
            worst = max(parity, key=lambda found: found.difference)
            if not worst.difference <= tolerance:
                raise ExportError(
                    f'{path} would differ from the network by {worst.difference:.2g} at '
                    f'{worst.shape}, more than tolerance={tolerance:g}.'
                )
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return parity


def _check(
    model: nn.Module, example: Tensor, path: Path, dynamic: Sequence[str], form: str
) -> None:
    if path.suffix not in ('.onnx', '.pt2'):
        raise ValueError(f'path must end in .onnx or .pt2, got {str(path)!r}.')
    if not path.parent.is_dir():
        raise ValueError(f'path: the folder {str(path.parent)!r} does not exist.')
    if path.is_dir():
        raise ValueError(f'path: {str(path)!r} is a folder; name a file.')
    if isinstance(dynamic, str) or not set(dynamic) <= set(DYNAMIC):
        raise ValueError(f"dynamic must be some of ('batch', 'size'), got {dynamic!r}.")
    if form not in FORMS:
        raise ValueError(f"form must be 'scan', 'matmul' or 'static', got {form!r}.")
    if not isinstance(model, nn.Module):
        raise ValueError(f'model must be a torch.nn.Module, got a {type(model).__name__}.')
    if not isinstance(example, Tensor) or example.dim() < 2 or not example.numel():
        found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f'example must be a tensor of images, got {found}.')
    if 'size' in dynamic and (example.dim() < 3 or min(example.shape[2:]) < 2):
        raise ValueError(
            f"dynamic has 'size', but example is of {tuple(example.shape)}: it needs spatial sizes "
            "of at least two. Or take dynamic=('batch',)."
        )
    if path.suffix == '.onnx':
        need('onnx', 'onnxruntime', 'onnxscript')
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if other := kinds - {torch.float32, torch.float16}:
            raise ValueError(
                f'model has parameters of {min(map(str, other))}, for which ONNX Runtime has no '
                'convolutions; take model.float(), and half=True for a file in float16.'
            )


@contextmanager
def _as_exported(form: str) -> Iterator[None]:
    """Has dynamic layers compute as their file will."""
    exported.form = form
    try:
        yield
    finally:
        exported.form = None


class _Half(nn.Module):
    """A copy of a network that computes in float16, between images and outputs of float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, images: Tensor) -> Any:
        outputs = self.network(images.half())
        return torch.utils._pytree.tree_map_only(Tensor, _single, outputs)


def _single(output: Tensor) -> Tensor:
    return output.float() if output.is_floating_point() else output


def _program(
    model: nn.Module, example: Tensor, dynamic: Sequence[str]
) -> torch.export.ExportedProgram:
    sizes: dict[int, Any] = {}
    if 'batch' in dynamic:
        sizes[0] = torch.export.Dim.DYNAMIC
    if 'size' in dynamic:
        sizes |= {dim: torch.export.Dim.DYNAMIC for dim in range(2, example.dim())}
    try:
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,))
    except Exception as error:
        fewer = [f'dynamic={tuple(d for d in dynamic if d != other)}' for other in dynamic]
        remedy = f' Or try {" or ".join(fewer)}.' if fewer else ''
        raise ExportError(
            f'{type(model).__name__} cannot be exported with dynamic={tuple(dynamic)}: '
            f'{_told(error)}{remedy}'
        ) from error


def _told(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip() or "it says no more"}'


def _check_computes(model: nn.Module, example: Tensor) -> None:
    """Some heads need more than images, such as their sizes or proposals."""
    try:
        model(example)
    except Exception as error:
        whole = isinstance(model, DenseNetwork)
        remedy = ' Its backbone may: export model.backbone, or give --backbone.' if whole else ''
        raise ExportError(
            f'{type(model).__name__} does not compute from images of {tuple(example.shape)} alone: '
            f'{_told(error).rstrip(".")}.{remedy}'
        ) from error


def _write_program(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Any]:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Any]:
    import onnx

    try:
        written: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=['images']
        )
    except Exception as error:
        raise ExportError(f'The program cannot be written as ONNX: {error}') from error
    # One file. Weights beside it would be lost when it is moved.
    written.save(path, external_data=False)
    onnx.checker.check_model(str(path))
    run, _ = onnx_session(path)
    return run


def _compared(
    model: nn.Module, run: Callable, example: Tensor, dynamic: Sequence[str]
) -> Iterator[Parity]:
    """Runs the file and the network at every batch, and then at every size."""
    shapes = [tuple(example.shape)]
    if 'batch' in dynamic:
        shapes = [(batch, *example.shape[1:]) for batch in BATCHES]
    if 'size' in dynamic:
        batch, channels, *size = example.shape
        for growth in GROWTHS:
            grown = (side + growth[min(dim, 1)] for dim, side in enumerate(size))
            shapes.append((batch, channels, *grown))
    generator = torch.Generator().manual_seed(0)
    deviation, mean = torch.std_mean(example.float())
    for shape in shapes:
        # Different images, whose kernels differ.
        x = torch.randn(shape, generator=generator) * (deviation + 0.1) + mean
        x = x.to(example)
        try:
            found, of_file = _timed(run, x)
        except Exception as error:
            raise ExportError(f'The file does not take images of {shape}: {error}') from error
        expected, of_network = _timed(model, x)
        apart = difference(tensors_of(found), tensors_of(expected))
        if shape == shapes[0] and not all(output.any() for output in tensors_of(expected)):
            LOGGER.warning(
                'The network gives an output of zeros alone, of which a comparison says nothing. '
                'Deep networks of random weights do; export trained ones.'
            )
        yield Parity(shape, apart, (of_file, of_network))


def _timed(run: Callable, x: Tensor) -> tuple[Any, float]:
    """A result, and the seconds of the second run: the first one asks for memory."""
    run(x)
    begin = time.perf_counter()
    result = run(x)
    return result, time.perf_counter() - begin
