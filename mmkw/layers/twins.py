"""What is done to a static layer, done to the dynamic one in its place.

Initialisers and constructors of optimizers look for layers by type, by name and by ``weight``.
While they work, static twins stand in the places of dynamic modules: real ``torch.nn`` layers with
the kernel of the one-to-one start (paper, section 3.4). What has become of them is handed on
afterwards. So nothing reaches an attention that was meant for a kernel.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import modes
from .warehouse import WarehouseManager
from .warm_start import warm_start

# The one-to-one start: it sets cells alone, and leaves attentions as they are.
_TAU = 1.0


class StandsForStatic(nn.Module):
    """A module in the place of a static one, of which it can make the twin."""

    def static_twin(self) -> nn.Module:
        """Makes the static module that this one equals at a temperature of 1.

        Returns:
            A module of ``torch.nn``, with parameters of its own or with this one's. Below a budget
            of 1 its kernel is zero where the one-to-one start assigns no cell.
        """
        raise NotImplementedError

    def counterparts(self, twin: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Pairs parameters of a twin with those here that do the same.

        Args:
            twin: Made by :meth:`static_twin`.

        Yields:
            A parameter of the twin and one or more of this module; for its kernel the cells.
        """
        raise NotImplementedError

    def take_values(self, twin: nn.Module, kernels: 'Kernels') -> None:
        """Takes what has become of a twin, but for the kernels.

        Args:
            twin: Made by :meth:`static_twin`.
            kernels: Gains the kernels that have changed.
        """
        raise NotImplementedError

    def apply(self, fn: Callable[[nn.Module], Any]) -> 'StandsForStatic':
        """Applies a function to every module in here, an initialiser to the static twin instead.

        Args:
            fn: Of a module. If it changes a parameter of the twin that is taken over, and nothing
                else happens. If not it is applied to the modules here, whose parameters keep their
                values: they are no static layer's.
        """
        if not _has_values(self):
            return super().apply(fn)
        twin = self.static_twin()
        before = _copies(twin)
        twin.apply(fn)
        if _has_changed(twin, before):
            kernels = Kernels()
            self.take_values(twin, kernels)
            kernels.lay_into_warehouses()
            return self
        values = {parameter: parameter.detach().clone() for parameter in self.parameters()}
        # The next layer is given the random numbers that it would be given in a static network.
        with torch.random.fork_rng(devices=[]):
            super().apply(fn)
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        return self


class Kernels:
    """Static kernels on their way into warehouses.

    Attributes:
        loaded: Whether those that come are of a checkpoint. They give a warm start, also where
            what an initialiser sets does not.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[bool, WarehouseManager, int], dict[int, tuple[Any, Tensor]]] = {}
        self.loaded = False

    def add(self, layer: Any, kernel: Tensor) -> None:
        """Adds a kernel of a :class:`~mmkw.layers.dynamic_layers.DynamicLayer`.

        Args:
            layer: The layer.
            kernel: Tensor[out, in, *kernel_size].
        """
        manager, warehouse, position = layer.place
        # The networks of the paper start their cells as released, whatever sets static kernels.
        if (self.loaded or not manager.keeps_start) and manager.weights.is_plain:
            key = (self.loaded, manager, warehouse)
            self._found.setdefault(key, {})[position] = (layer, kernel)

    def lay_into_warehouses(self) -> None:
        """Makes the cells the pieces of the kernels, by the one-to-one start.

        Those of a checkpoint come last, by the start that the network has for checkpoints.
        """
        for (loaded, manager, warehouse), found in sorted(
            self._found.items(), key=lambda item: item[0][0]
        ):
            tau = manager.start_tau if loaded else _TAU
            partition, cells = manager.partitions[warehouse], manager.weights[warehouse]
            names = {position: partition.layers[position].kernel.layer for position in found}
            kernels = {names[position]: kernel for position, (_, kernel) in found.items()}
            attentions = {
                names[position]: layer.attention for position, (layer, _) in found.items()
            }
            started, _ = warm_start(partition, kernels, attentions, cells, tau)
            with torch.no_grad():
                cells.copy_(started)
            if loaded:
                for attention in attentions.values():
                    attention.temperature = tau


class StaticTwins:
    """The twins of all dynamic modules of a network, in their places until :meth:`leave`.

    Meanwhile the network has no warehouses, as a static one: some initialisers take every
    parameter for a kernel.

    Args:
        network: Any network. Its dynamic modules must have values, whole ones.

    Attributes:
        of: The twin of every dynamic module.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._places: list[tuple[nn.Module, str, StandsForStatic]] = []
        self._managers: list[tuple[nn.Module, str, WarehouseManager]] = []
        self.of: dict[StandsForStatic, nn.Module] = {}
        self._visit(network, set())
        self._before = {twin: _copies(twin) for twin in self.of.values()}
        self._loaded: set[nn.Module] = set()
        self._handles = [
            twin._register_load_state_dict_pre_hook(self._note_loaded, with_module=True)
            for twin in self.of.values()
        ]
        for parent, name, dynamic in self._places:
            parent._modules[name] = self.of[dynamic]
        for parent, name, _ in self._managers:
            # Its place among the others stays: optimizers know parameters by their order.
            parent._modules[name] = None
        if self._places:
            for module in network.modules():
                module.__dict__[_ACTIVE] = self
        self._note_parameters(self.of.values())

    def _visit(self, module: nn.Module, seen: set[nn.Module]) -> None:
        if module in seen:
            return
        seen.add(module)
        for name, child in module._modules.items():
            if isinstance(child, StandsForStatic):
                if _has_values(child):
                    self._places.append((module, name, child))
                    self.of.setdefault(child, child.static_twin())
            elif isinstance(child, WarehouseManager):
                if _are_whole(child.parameters()):
                    self._managers.append((module, name, child))
            elif child is not None:
                self._visit(child, seen)

    def _note_loaded(
        self, twin: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Notes a kernel that a part of the network loads; a hook of ``load_state_dict``."""
        for name, parameter in twin.named_parameters(recurse=False):
            kernel = state_dict.get(f'{prefix}{name}')
            if parameter.dim() > 1 and getattr(kernel, 'shape', None) == parameter.shape:
                self._loaded.add(twin)

    def _note_parameters(self, coming: Iterable[nn.Module]) -> None:
        """MMEngine notes what becomes of every parameter, and refuses new ones meanwhile."""
        notes = self._network.__dict__.get('_params_init_info')
        if notes is None:
            return
        for come in coming:
            for module in come.modules():
                module._params_init_info = notes
            for parameter in come.parameters():
                if parameter not in notes:
                    mean = parameter.detach().mean().cpu()
                    notes[parameter] = dict(init_info='As made', tmp_mean_value=mean)

    def stay(self) -> None:
        """Leaves the twins in the places of the dynamic modules, for good."""
        self._places.clear()
        for handle in self._handles:
            handle.remove()
        for module in self._network.modules():
            module.__dict__.pop(_ACTIVE, None)
        self._put_managers_back()

    def _put_managers_back(self) -> None:
        for parent, name, manager in self._managers:
            parent._modules[name] = manager

    def leave(self, taking_values: bool = True) -> None:
        """Puts the dynamic modules back. More than once does no harm.

        Args:
            taking_values: Whether what has become of the twins is handed on to them.
        """
        if not self._places:
            return
        for module in self._network.modules():
            module.__dict__.pop(_ACTIVE, None)
        for parent, name, dynamic in self._places:
            parent._modules[name] = dynamic
        self._places.clear()
        self._put_managers_back()
        self._note_parameters([*self.of, *(manager for _, _, manager in self._managers)])
        if not taking_values:
            return
        kernels = Kernels()
        for dynamic, twin in self.of.items():
            if dynamic.training != twin.training:
                dynamic.train(twin.training)
            kernels.loaded = twin in self._loaded
            if kernels.loaded or _has_changed(twin, self._before[twin]):
                dynamic.take_values(twin, kernels)
        kernels.lay_into_warehouses()


_ACTIVE = '_static_twins'


@contextmanager
def static_twins(network: nn.Module, taking_values: bool = True) -> Iterator[StaticTwins]:
    """Has static twins stand in the places of a network's dynamic modules.

    Args:
        network: Any network.
        taking_values: As in :meth:`StaticTwins.leave`.

    Yields:
        The twins. A state dict that is loaded meanwhile ends their stay.
    """
    twins = StaticTwins(network)
    try:
        yield twins
    except BaseException:
        twins.leave(False)
        raise
    twins.leave(taking_values)


def leave_static_twins(network: nn.Module, *_: Any) -> None:
    """Ends the stay of static twins before a state dict is loaded; a hook of a converted network.

    Args:
        network: Where they may stand.
        *_: What ``load_state_dict`` passes to a hook beyond that.
    """
    twins = network.__dict__.get(_ACTIVE)
    if twins is not None:
        twins.leave()


def _copies(twin: nn.Module) -> list[Tensor]:
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in twin.parameters()]


def _has_changed(twin: nn.Module, before: list[Tensor]) -> bool:
    return any(
        old.requires_grad != new.requires_grad or not torch.equal(old, new)
        for old, new in zip(before, twin.parameters())
    )


def _has_values(dynamic: StandsForStatic) -> bool:
    """Whether this process has all values of a module."""
    cells = [module.cells for module in dynamic.modules() if hasattr(module, 'cells')]
    return _are_whole(cells) and not any(tensor.is_meta for tensor in dynamic.parameters())


def _are_whole(cells: Iterable[Tensor]) -> bool:
    """Whether this process has all values of some cells."""
    return not any(modes.is_sharded(values) or values.is_meta for values in cells)
