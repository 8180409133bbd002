"""Networks that cut images into windows (Swin): the number of images is part of the program.

MMDetection's, MMSegmentation's and MMPretrain's divide floating-point numbers in Python to find it.
An exporter takes the result for a constant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def windowed(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that put windows together again.

    Args:
        model: Any model.
    """
    return [module for module in model.modules() if hasattr(type(module), 'window_reverse')]


@contextmanager
def counted_in_program(model: nn.Module) -> Iterator[None]:
    """Has a model count images by its tensors' sizes, so that they may be any.

    Args:
        model: Any model. It is as before in the end.
    """
    modules = windowed(model)
    for module in modules:
        module.__dict__['window_reverse'] = _put_together_by(getattr(module, 'window_size', 0))
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__['window_reverse']


def _put_together_by(side: int) -> Callable[..., Tensor]:
    # MMPretrain's gives the side with every call.
    def put_together(windows: Tensor, height: int, width: int, side: int = side) -> Tensor:
        """Maps Tensor[all windows, side, side, channels] to Tensor[images, *size, channels]."""
        rows, columns, channels = height // side, width // side, windows.shape[-1]
        images = windows.shape[0] // (rows * columns)
        parts = windows.view(images, rows, columns, side, side, channels)
        return parts.transpose(2, 3).reshape(images, height, width, channels)

    return put_together
