"""What runs ``.onnx`` files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def need(*packages: str) -> None:
    """Refuses to go on without packages of the extra ``deploy``.

    Args:
        *packages: Names of modules.

    Raises:
        ModuleNotFoundError: If one is missing.
    """
    for package in packages:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"ONNX needs {error.name}, which is not installed. Run: pip install 'mmkw[deploy]'",
                name=error.name,
            ) from error


def onnx_session(
    path: str | Path, threads: int = 0
) -> tuple[Callable[[Tensor], list], Sequence[Any]]:
    """Opens a file in ONNX Runtime, on the CPU.

    Args:
        path: A file with one input.
        threads: How many threads compute; by default as many as there are cores.

    Returns:
        A function of images that gives the outputs as arrays, and the shape of the images: numbers,
        or names where any number may stand.

    Raises:
        ModuleNotFoundError: If ONNX Runtime is not installed.
    """
    need('onnxruntime')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, ['CPUExecutionProvider'])
    (images,) = session.get_inputs()
    return lambda x: session.run(None, {images.name: x.numpy()}), images.shape
