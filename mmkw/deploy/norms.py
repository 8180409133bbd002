"""Fits the running means of BatchNorms to a network whose kernels have changed.

A BatchNorm of the changed network should give, in the mean over the same images, what that of the
network gave. If the mean of its input is ``m`` in the network and ``m'`` in the changed one, its
running mean ``M`` becomes ``M + m' - m``. Where ``M`` is the mean of the images this is its
estimate anew, ``m'``. Where it is not, as in detectors that keep the statistics of ImageNet, what
the network has learnt on top of them stays.

Variances stay as they are. Kernels that differ from image to image spread the values of a map more
than their mean does, so new variances would enlarge what all images have in common.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layers import LayerAttention
from ..ops import modes
from .calibration import predict


class _Mean(NamedTuple):
    """The mean of each channel over some inputs of a norm, and over how many values."""

    number: int
    value: Tensor | float

    @classmethod
    def of(cls, x: Tensor) -> '_Mean':
        dims = [dim for dim in range(x.dim()) if dim != 1]
        return cls(x.numel() // x.shape[1], x.float().mean(dims).double())

    def joined(self, other: '_Mean') -> '_Mean':
        number = self.number + other.number
        total = self.number * self.value + other.number * other.value
        return _Mean(number, total / number)


def match_norms(network: nn.Module, changed: nn.Module, loader: Iterable[Any]) -> None:
    """Sets the running means of the BatchNorms of a changed network.

    Both networks must be in evaluation mode. Norms inside attentions keep their statistics.

    Args:
        network: The network as it was.
        changed: The same with other kernels; its modules have the same names.
        loader: Batches of images.
    """
    norms = dict(_norms(changed))
    originals = {name: norm for name, norm in _norms(network) if name in norms}
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    # Of the batch, in the order of the calls.
    calls: dict[str, list[_Mean]] = {name: [] for name in norms}
    total = {name: (_Mean(0, 0.0), _Mean(0, 0.0)) for name in norms}

    def match(name: str, found: _Mean) -> None:
        # Heads over regions may compute more often than in the network.
        if calls[name]:
            expected = calls[name].pop(0)
            # The layers that follow must see what is matched already.
            norms[name].running_mean.copy_(before[name] + (found.value - expected.value))
            total[name] = (total[name][0].joined(expected), total[name][1].joined(found))

    for batch in loader:
        for means in calls.values():
            means.clear()
        with _watched(originals, lambda name, found: calls[name].append(found)):
            predict(network, batch)
        with _watched(norms, match):
            predict(changed, batch)
    for name, (expected, found) in total.items():
        norms[name].running_mean.copy_(before[name] + (found.value - expected.value))


def _norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The BatchNorms with running statistics, but those of attentions."""
    attentions = [module for module in network.modules() if isinstance(module, LayerAttention)]
    inside = {module for attention in attentions for module in attention.modules()}
    for name, module in network.named_modules():
        fits = isinstance(module, modes.BATCH_NORM) and module.running_mean is not None
        if fits and module not in inside:
            yield name, module


@contextmanager
def _watched(norms: dict[str, nn.Module], note: Callable[[str, _Mean], None]) -> Iterator[None]:
    """Notes the mean of every input of the norms, before they compute."""

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel():
                note(name, _Mean.of(inputs[0]))

        return hook

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(hook_of(name)).remove)
        yield
