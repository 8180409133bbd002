"""Fits the statistics of BatchNorms to a network whose kernels have changed.

A BatchNorm of the changed network should give what that of the network gave, in mean and variance
over the same images. Let its input have mean ``m`` and variance ``v`` in the network, ``m'`` and
``v'`` in the changed one, and let its running statistics be ``M`` and ``V``. With ``r^2 = (v' +
eps) / (v + eps)`` the new ones are ``M' = m' + (M - m) r`` and ``V' + eps = (V + eps) r^2``. Where
the running statistics are those of the images this is their estimate anew, ``M' = m'`` and ``V' =
v'``. Where they are not, as in detectors that keep those of ImageNet, what the network has learnt
on top of them stays.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Attention
from ..ops import modes
from .calibration import predict


class _Moments(NamedTuple):
    """Number, mean and variance of each channel of some inputs of a norm."""

    number: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> '_Moments':
        dims = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x.float(), dims, correction=0)
        return cls(x.numel() // x.shape[1], mean.double(), variance.double())

    def joined(self, other: '_Moments') -> '_Moments':
        number = self.number + other.number
        share = other.number / number
        mean = torch.lerp(self.mean, other.mean, share)
        between = share * (1 - share) * (self.mean - other.mean).square()
        return _Moments(number, mean, torch.lerp(self.variance, other.variance, share) + between)


def match_norms(network: nn.Module, changed: nn.Module, loader: Iterable[Any]) -> None:
    """Sets the running statistics of the BatchNorms of a changed network.

    Both networks must be in evaluation mode. Norms inside attentions keep their statistics.

    Args:
        network: The network as it was.
        changed: The same with other kernels; its modules have the same names.
        loader: Batches of images.
    """
    norms = dict(_norms(changed))
    originals = {name: norm for name, norm in _norms(network) if name in norms}
    before = {
        name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()
    }
    # Of the batch, in the order of the calls.
    calls: dict[str, list[_Moments]] = {name: [] for name in norms}
    total: dict[str, tuple[_Moments, _Moments]] = {}

    def fit(name: str, of_network: _Moments, of_changed: _Moments) -> None:
        norm, (mean, variance) = norms[name], before[name]
        scale = (of_changed.variance + norm.eps) / (of_network.variance + norm.eps)
        root = scale.sqrt()
        norm.running_mean.copy_(mean * root + (of_changed.mean - of_network.mean * root))
        norm.running_var.copy_((variance * scale + norm.eps * (scale - 1)).clamp_min(0))

    def match(name: str, found: _Moments) -> None:
        # Heads over regions may compute more often than in the network.
        if calls[name]:
            expected = calls[name].pop(0)
            # The layers that follow must see what is matched already.
            fit(name, expected, found)
            sums = total.get(name)
            total[name] = (
                (sums[0].joined(expected), sums[1].joined(found)) if sums else (expected, found)
            )

    for batch in loader:
        for moments in calls.values():
            moments.clear()
        with _watched(originals, lambda name, found: calls[name].append(found)):
            predict(network, batch)
        with _watched(norms, match):
            predict(changed, batch)
    for name, (of_network, of_changed) in total.items():
        fit(name, of_network, of_changed)


def _norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The BatchNorms with running statistics, but those of attentions."""
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    inside = {module for attention in attentions for module in attention.modules()}
    for name, module in network.named_modules():
        fits = isinstance(module, modes.BATCH_NORM) and module.running_mean is not None
        if fits and module not in inside:
            yield name, module


@contextmanager
def _watched(norms: dict[str, nn.Module], note: Callable[[str, _Moments], None]) -> Iterator[None]:
    """Notes the moments of every input of the norms, before they compute."""

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel():
                note(name, _Moments.of(inputs[0]))

        return hook

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(hook_of(name)).remove)
        yield
