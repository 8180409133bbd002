"""A static network where that is enough: every kernel is its mean over some images."""

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layers import ODConv2d
from ..layers.dynamic_layers import DynamicLayer
from ..layers.twins import exchange, has_values
from ..layers.warehouse import WarehouseManager
from ..ops import mix_cells, modes
from ..sharing import SharingPlan, convert, is_converted
from ..sharing.convert import leave_warehouses
from ..sharing.freezing import FreezeBeforeMixing
from .calibration import check_loader, count_images, distance, predict
from .networks import evaluating
from .norms import match_norms

TOP = re.compile(r'top\s*(\d+(?:\.\d+)?)\s*%')


class LayerSpread(NamedTuple):
    """How much the kernel of a layer varies over images.

    Attributes:
        layer: Name of the layer.
        spread: The root mean square distance of an image's kernel from the mean kernel, relative to
            the length of the mean kernel. At least 0; 0 if all images have the same kernel.
        kept: Whether the layer stays dynamic.
    """

    layer: str
    spread: float
    kept: bool


@dataclass(frozen=True)
class StaticReport:
    """What a static twin loses. As a string it is a table.

    Attributes:
        images: How many images the kernels are averaged over.
        layers: All dynamic layers; those whose kernels vary most come first.
        distance: The mean over the outputs of their distance from the dynamic network's, relative
            to the length of those; see :func:`~mmkw.deploy.to_static`.
    """

    images: int
    layers: tuple[LayerSpread, ...]
    distance: float

    def __str__(self) -> str:
        kept = sum(layer.kept for layer in self.layers)
        rows = [
            f'| {name} | {spread:.4f} | {"dynamic" if kept else "static"} |'
            for name, spread, kept in self.layers
        ]
        return '\n'.join(
            [
                '| layer | spread of its kernels | is |\n|---|---|---|',
                *rows,
                f'Kernels averaged over {self.images} images, {kept} of {len(rows)} layers stay '
                f'dynamic. The outputs are {100 * self.distance:.2f} % off the dynamic network.',
            ]
        )


def to_static(
    network: nn.Module, loader: Iterable[Any], keep: str | Collection[str] = ()
) -> tuple[nn.Module, StaticReport]:
    """Makes the static network that is nearest to a dynamic one on some images.

    The kernel of a layer becomes its mean over the images, and the running means of BatchNorms are
    fitted, so that they give the means that they gave. The result is of the static network's class
    and has the names of its state dict; it computes as fast.

    Some layers may stay dynamic. The part of the network that has them keeps their warehouses,
    whole: a kept layer mixes the cells of the other layers as well.

    :func:`mmkw.to_static` is exact, but for temperature 1 only.

    Args:
        network: A converted network, a model that contains some, a dynamic layer, or a
            :class:`~mmkw.deploy.DenseNetwork`. It is not changed.
        loader: Batches of images, gone through four times: a data loader of MMEngine for a model of
            its libraries, with the pipeline for tests, or any list or loader of batches that are
            images or begin with images. A few hundred images are enough. They need no annotations.
        keep: Layers that stay dynamic: names, or such as ``'top 30 %'``, those whose kernels vary
            most, rounded up.

    Returns:
        The static network in evaluation mode, and what it loses. The distance is that of the
        outputs of :class:`~mmkw.deploy.DenseNetwork` for models of OpenMMLab's libraries, else of
        all outputs.

    Raises:
        ValueError: If the network has no dynamic layer or no values in this process, if a layer
            computes for no image or is an ``ODConv2d``, or if ``loader`` or ``keep`` is wrong.

    Example:
        >>> network = mmkw.KWResNet(18, base_channels=8)
        >>> loader = [torch.rand(4, 3, 64, 64) for _ in range(2)]
        >>> twin, report = mmkw.deploy.to_static(network, loader)
        >>> 'layer1.0.conv1.weight' in twin.state_dict(), mmkw.is_converted(twin), report.images
        (True, False, 8)
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, DynamicLayer)}
    if not layers:
        raise ValueError(f'{type(network).__name__} has no dynamic layer: it is static.')
    for name, layer in layers.items():
        if not has_values(layer):
            raise ValueError(
                f'{name or type(network).__name__} has no values in this process: it is on the '
                'meta device, or its cells are sharded. Load or gather them first.'
            )
        if isinstance(layer, ODConv2d):
            raise ValueError(
                f'{name or type(network).__name__} is an ODConv2d, whose input and output are '
                'scaled for every image: there is no mean kernel. Export it as it is.'
            )
    check_loader(loader)
    _check_keep(keep, layers)
    with evaluating(network):
        images, means = _averaged(network, layers, loader)
        kept = _kept(keep, {name: mean.spread for name, mean in means.items()})
        for name in layers.keys() - kept - means.keys():
            raise ValueError(
                f'{name} computes for none of the {images} images of loader, so it has no mean. '
                f'Give images for which it does, or keep=[{name!r}].'
            )
        twin = copy.deepcopy(network)
        kernels = {name: mean.kernel for name, mean in means.items() if name not in kept}
        twin = _with_kernels(twin, kernels, kept)
        with evaluating(twin):
            match_norms(network, twin, loader)
            apart = distance(network, twin, loader)
    # Not chained: some networks' eval() returns nothing.
    twin.eval()
    spreads = [LayerSpread(n, means[n].spread if n in means else 0.0, n in kept) for n in layers]
    order = sorted(spreads, key=lambda layer: layer.spread, reverse=True)
    return twin, StaticReport(images, tuple(order), apart)


class _Mean:
    """The mean kernel of a layer, and how its kernels vary.

    Kernels are not assembled. The product of two kernels is that of their attentions and of the
    cells' products with each other.
    """

    def __init__(self, layer: DynamicLayer, products: Tensor) -> None:
        self._layer = layer
        self._products = products
        self._count = 0
        self._attention: Any = 0.0
        self._squares = 0.0

    def add(self, attention: Tensor) -> None:
        """Adds the attentions of a batch: Tensor[batch, mixtures, cells]."""
        attention = attention.double()
        self._count += len(attention)
        self._attention = self._attention + attention.sum(0)
        self._squares += self._product(attention)

    def _product(self, attention: Tensor) -> float:
        return float((attention @ self._products).mul_(attention).sum())

    @property
    def is_empty(self) -> bool:
        return not self._count

    @property
    def kernel(self) -> Tensor:
        """Tensor[out, in, *kernel_size]."""
        mean = (self._attention / self._count).to(self._layer.cells).unsqueeze(0)
        (kernel,) = mix_cells(mean, self._layer.cells, self._layer.share.grid)
        return kernel.contiguous()

    @property
    def spread(self) -> float:
        """See :class:`LayerSpread`."""
        length = self._product(self._attention / self._count)
        variance = max(self._squares / self._count - length, 0.0)
        return math.sqrt(variance / length) if length else 0.0


def _averaged(
    network: nn.Module, layers: Mapping[str, DynamicLayer], loader: Iterable[Any]
) -> tuple[int, dict[str, _Mean]]:
    """Counts images, and averages over all calls of the layers that compute."""
    products: dict[tuple[WarehouseManager, int], Tensor] = {}
    means = {}
    for name, layer in layers.items():
        manager, warehouse, _ = layer.place
        if (manager, warehouse) not in products:
            cells = layer.cells.detach().flatten(1).double()
            products[manager, warehouse] = cells @ cells.T
        means[name] = _Mean(layer, products[manager, warehouse])
    images = 0
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.attention.register_forward_hook(
                lambda module, inputs, attention, mean=means[name]: mean.add(attention)
            )
            stack.callback(hook.remove)
        for batch in loader:
            predict(network, batch)
            images += count_images(batch)
    if not images:
        raise ValueError('loader has no images.')
    return images, {name: mean for name, mean in means.items() if not mean.is_empty}


def _check_keep(keep: str | Collection[str], layers: Collection[str]) -> None:
    if isinstance(keep, str):
        found = TOP.fullmatch(keep.strip())
        if found is None or float(found[1]) > 100:
            raise ValueError(
                f"keep must be such as 'top 30 %', from 0 to 100, or names of layers, got {keep!r}."
            )
    elif not isinstance(keep, Collection):
        raise ValueError(
            f"keep must be such as 'top 30 %' or names of layers, by default none, got {keep!r}."
        )
    elif unknown := set(keep) - set(layers):
        raise ValueError(
            f'keep names {sorted(unknown)}, which are no dynamic layers; they are {list(layers)}. '
            "Or give such as 'top 30 %'."
        )


def _kept(keep: str | Collection[str], spreads: Mapping[str, float]) -> set[str]:
    """The names of the layers that stay dynamic."""
    if not isinstance(keep, str):
        return set(keep)
    percent = float(TOP.fullmatch(keep.strip())[1])  # type: ignore[index]
    order = sorted(spreads, key=spreads.__getitem__, reverse=True)
    return set(order[: math.ceil(percent * len(order) / 100)])


def _with_kernels(
    network: nn.Module, kernels: Mapping[str, Tensor], kept: Collection[str]
) -> nn.Module:
    """Gives a network static layers with these kernels; ``kept`` layers stay as they are."""
    if '' in kernels:
        return _static_layer(network, kernels[''])
    if not kernels:
        return network
    parts = [_Part(part) for part in network.modules() if is_converted(part)]
    keeping = {network.get_submodule(name) for name in kept}
    shared = {layer for part in parts for layer in part.layers.values()}
    # A layer with cells of its own comes back as it is.
    alone = {layer: nn.Identity() for layer in keeping - shared}
    averaged = {network.get_submodule(name): kernel for name, kernel in kernels.items()}
    static = {layer: _static_layer(layer, kernel) for layer, kernel in averaged.items()}
    exchange(network, {**static, **alone})
    leave_warehouses(network)
    exchange(network, {stand_in: layer for layer, stand_in in alone.items()})
    for part in parts:
        part.convert_again(keeping)
    return network


def _static_layer(layer: Any, kernel: Tensor) -> nn.Module:
    static = layer.static_twin()
    static.weight.copy_(kernel.view_as(static.weight))
    return static


class _Part:
    """A converted part of a network, before its layers become static.

    Attributes:
        layers: Its dynamic layers by their name in the part.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._manager: Any = network.warehouse_manager
        # As in the plan; where a layer is at two places it has the name of the first.
        self.layers: dict[str, Any] = {
            module.share.kernel.layer: module
            for module in network.modules()
            if isinstance(module, DynamicLayer) and module.place[0] is self._manager
        }

    def convert_again(self, keeping: Collection[nn.Module]) -> None:
        """Makes the layers to be kept dynamic again, with the cells and attentions they had.

        Warehouses none of whose layers is kept are left out.
        """
        kept = {name: layer for name, layer in self.layers.items() if layer in keeping}
        used = sorted({layer.place[1] for layer in kept.values()})
        if not used:
            return
        partitions = [self._manager.partitions[index] for index in used]
        shares = [(share, partition) for partition in partitions for share in partition.layers]
        plan = SharingPlan(
            tuple((share.kernel.layer, partition.name) for share, partition in shares),
            {partition.name: partition.options for partition in partitions},
        )
        absent = [share.kernel for share, _ in shares if share.kernel.layer not in kept]
        start_tau = self._manager.start_tau
        convert(self._network, plan, None, absent, start_tau, keep_weights=False)
        weights = self._network.warehouse_manager.weights
        for place, index in enumerate(used):
            weights[place].data = self._manager.weights[index].detach()
        for name, layer in kept.items():
            new = self._network.get_submodule(name)
            modes.remove_pre_hooks(layer.attention, (FreezeBeforeMixing,))
            for hook in modes.pre_hooks_of(new.attention, FreezeBeforeMixing):
                layer.attention.register_forward_pre_hook(hook)
            new.attention = layer.attention
