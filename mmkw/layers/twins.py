"""Static twins: what other code does to a static layer also happens to the dynamic layer.

Initialisers and constructors of optimizers look for layers by type, by name and by ``weight``.
While they work, static twins replace the dynamic modules. A static twin is a real ``torch.nn``
layer with the kernel of the one-to-one start (paper, section 3.4). Afterwards the dynamic modules
come back and take over what has changed in their twins. So an initialiser for kernels never changes
an attention.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import modes
from .attention import LayerAttention
from .tracing import no_weight
from .warehouse import WarehouseManager
from .warm_start import warm_start

# At this temperature a warm start sets the cells and does not change the attentions.
_TAU = 1.0


def exchange(network: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Puts other modules in the places of some modules, in all places of each.

    Args:
        network: Any network; changed in place.
        others: The other modules, by those they replace.
    """
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child in others:
                parent._modules[name] = others[child]


class StandsForStatic(nn.Module):
    """A module that replaces a static module and can make the static twin."""

    # The names of what others have put on the static module, or on this one by way of twins; see
    # :meth:`apply`. Twins have it, too.
    _put: frozenset[str] = frozenset()

    def static_twin(self) -> nn.Module:
        """Makes the static module that computes the same as this module at temperature 1.

        The twin of a comparator computes what all its kernels give with the same attention, as at
        a warm start.

        Returns:
            A module of ``torch.nn``. It may share parameters with this module. With a budget below
            1, the kernel is zero where the one-to-one start assigns the zero cell. Where this
            process has only a part of the cells, the kernel is on the meta device.
        """
        raise NotImplementedError

    def hand_on(self, twin: nn.Module) -> None:
        """Puts on a twin what others have put on the static module, or on this one.

        Args:
            twin: Made by :meth:`static_twin`.
        """
        for name in self._put:
            if name in vars(self):
                vars(twin)[name] = vars(self)[name]
            elif name in self._modules:
                setattr(twin, name, self._modules[name])

    def counterparts(self, twin: nn.Module) -> Iterator[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Pairs every parameter of a twin with the parameters of this module that do its work.

        Args:
            twin: Made by :meth:`static_twin`.

        Yields:
            A parameter of the twin, and one or more parameters of this module. The kernel of the
            twin is paired with the cells.
        """
        raise NotImplementedError

    def take_values(self, twin: nn.Module, kernels: 'Kernels') -> None:
        """Takes over the values of a twin, and hands its changed kernels to ``kernels``.

        Args:
            twin: Made by :meth:`static_twin`.
            kernels: Collects the kernels that have changed.
        """
        raise NotImplementedError

    def apply(self, fn: Callable[[nn.Module], Any]) -> 'StandsForStatic':
        """Applies a function to the static twin, or to this module and its submodules.

        What the function puts on the twin (hooks, buffers, attributes, settings such as a stride)
        is this module's, and on its next twin.

        Args:
            fn: A function of a module; first applied to the twin. If it changes a parameter of the
                twin, this module takes over the values, and ``apply`` ends. If it changes none, it
                is applied to what is in here and not in the twin, and to this module if it put
                nothing on the twin. Their parameters keep their values, because a static network
                does not have them. But where it resets the twin, the attentions are reset, too:
                nothing that was learnt is left.

        Raises:
            AttributeError: If the function prunes or parametrises the twin, which has a weight.
        """
        if not has_values(self):
            return super().apply(fn)
        twin = self.static_twin()
        exchange = _Exchange(self, twin)
        before, is_reset = _copies(twin), _watch_reset(twin)
        exchange.begin()
        twin.apply(fn)
        exchange.check()
        if is_reset:
            # The next layer must get the same random numbers as in a static network.
            with torch.random.fork_rng(devices=[]):
                _reset_attentions(self)
        has_put = exchange.end()
        if _has_changed(twin, before):
            kernels = Kernels()
            self.take_values(twin, kernels)
            kernels.lay_into_warehouses()
            return self
        values = {parameter: parameter.detach().clone() for parameter in self.parameters()}
        done = set(twin.modules())
        # The next layer must get the same random numbers as in a static network.
        with torch.random.fork_rng(devices=[]):
            for module in reversed(list(self.modules())):
                if module not in done and not (has_put and module is self):
                    fn(module)
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        return self


class _Exchange:
    """Hands on what a function puts on a twin beside values: hooks, buffers and attributes.

    The twin has the hooks and buffers of the module itself, so that handles of hooks remain valid.

    Args:
        module: The module that the twin stands for.
        twin: Its twin, as made.
    """

    def __init__(self, module: StandsForStatic, twin: nn.Module) -> None:
        self._module, self._twin = module, twin
        modes.hand_hooks_on(module, twin)
        twin._buffers = module._buffers

    def begin(self) -> None:
        """Notes how the twin is before the function."""
        self._kind, self._parameters = type(self._twin), list(self._twin._parameters)
        self._before = self._attributes()
        dicts = (*modes.hooks_of(self._twin).values(), self._twin._buffers)
        self._contents = [(each, dict(each)) for each in dicts]

    def check(self) -> None:
        """Refuses a twin whose weight is computed from others now, and leaves no trace of them."""
        kind, parameters = type(self._twin), list(self._twin._parameters)
        if (kind, parameters) != (self._kind, self._parameters):
            for each, content in self._contents:
                each.clear()
                each.update(content)
            raise AttributeError(no_weight(self._module))

    def end(self) -> bool:
        """Puts on the module what the function put on the twin; whether there is anything."""
        put, gone = _difference(self._attributes(), self._before)
        if 'training' in put:
            self._module.train(put.pop('training'))
        for name, value in put.items():
            setattr(self._module, name, value)
        for name in gone & self._module._put:
            delattr(self._module, name)
        names = (self._module._put | (put.keys() - self._before.keys())) - gone
        if names != self._module._put:
            self._module._put = names
        return bool(put or gone) or any(
            any(_difference(each, content)) for each, content in self._contents
        )

    def _attributes(self) -> dict[str, Any]:
        return {**vars(self._twin), **self._twin._modules}


def _difference(now: dict, before: dict) -> tuple[dict, set]:
    """What of a dict is new, and the keys that it has no more."""
    new = {key: value for key, value in now.items() if before.get(key, before) is not value}
    return new, before.keys() - now.keys()


def _watch_reset(twin: nn.Module) -> list[bool]:
    """A list that is filled when the twin is reset."""
    called: list[bool] = []
    reset: Callable[[], None] = getattr(twin, 'reset_parameters', lambda: None)

    def noting() -> None:
        called.append(True)
        reset()

    twin.reset_parameters = noting
    return called


def _reset_attentions(dynamic: StandsForStatic) -> None:
    for attention in dynamic.modules():
        if isinstance(attention, LayerAttention):
            attention.start_anew()


class Kernels:
    """Collects static kernels, and then writes them into the warehouses.

    Attributes:
        loaded: Whether the next kernels are of a trained network. These give a warm start. Kernels
            from an initialiser do not.
    """

    def __init__(self, loaded: bool = False) -> None:
        self._found: dict[tuple[bool, WarehouseManager, int], dict[str, tuple[Any, Tensor]]] = {}
        self.loaded = loaded

    def add(self, layer: Any, kernel: Tensor) -> None:
        """Adds a kernel.

        Args:
            layer: The :class:`~mmkw.layers.dynamic_layers.DynamicLayer` that the kernel is for.
            kernel: Tensor[out, in, *kernel_size].
        """
        manager, warehouse, _ = layer.place
        # In the paper's networks an initialiser does not change the released start of the cells.
        if (self.loaded or not manager.keeps_start) and manager.weights.is_plain:
            key = (self.loaded, manager, warehouse)
            self._found.setdefault(key, {})[layer.share.kernel.layer] = (layer, kernel)

    def lay_into_warehouses(self) -> dict[str, float]:
        """Sets the cells to the pieces of the kernels, by the one-to-one start.

        Kernels from a checkpoint come last. They start the network at its ``start_tau``.

        Returns:
            The error of :func:`~mmkw.layers.warm_start`, by the name of the warehouse.
        """
        errors = {}
        for (loaded, manager, warehouse), found in sorted(
            self._found.items(), key=lambda item: item[0][0]
        ):
            partition, cells = manager.partitions[warehouse], manager.weights[warehouse]
            kernels = {name: kernel for name, (_, kernel) in found.items()}
            attentions = {name: layer.attention for name, (layer, _) in found.items()}
            # With fewer cells than pieces attentions that have begun belong to their cells.
            few = partition.options.cell_num_ratio < 1 and len(found) == len(partition.layers)
            begun = few and all(attention.has_begun for attention in attentions.values())
            tau = manager.start_tau if loaded or begun else _TAU
            started, errors[partition.name] = warm_start(partition, kernels, attentions, cells, tau)
            with torch.no_grad():
                cells.copy_(started)
            if loaded:
                for attention in attentions.values():
                    attention.begin(tau)
        return errors


class StaticTwins:
    """Replaces all dynamic modules of a network by their static twins, until :meth:`leave`.

    Modules whose tensors are sharded or on the meta device have no values to take. They stay in
    place.

    Meanwhile the network has no warehouses, as a static one: some initialisers take every
    parameter for a kernel.

    Args:
        network: Any network.
        taking_values: Whether the dynamic modules take over the values of their twins in the end.
            If not, modules without values have twins, too.

    Attributes:
        of: The twin of every dynamic module that has one.
    """

    def __init__(self, network: nn.Module, taking_values: bool = True) -> None:
        self._network = network
        self._taking_values = taking_values
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
                if not self._taking_values or has_values(child):
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
        """Adds new parameters to MMEngine's notes about initialisation.

        MMEngine notes how each parameter is initialised, and refuses parameters it does not know.
        """
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
        """Lets the twins replace the dynamic modules for good."""
        self._places.clear()
        for handle in self._handles:
            handle.remove()
        for dynamic, twin in self.of.items():
            modes.hand_hooks_on(dynamic, twin)
        for module in self._network.modules():
            module.__dict__.pop(_ACTIVE, None)
        self._put_managers_back()

    def _put_managers_back(self) -> None:
        for parent, name, manager in self._managers:
            parent._modules[name] = manager

    def leave(self, failed: bool = False) -> None:
        """Puts the dynamic modules back. A second call does nothing.

        Args:
            failed: Whether the dynamic modules keep their values all the same.
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
        if failed or not self._taking_values:
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
    """Replaces the dynamic modules of a network by their static twins inside a ``with`` block.

    Args:
        network: Any network.
        taking_values: As in :class:`StaticTwins`.

    Yields:
        The twins. If the block loads a state dict, the dynamic modules come back before that.
    """
    twins = StaticTwins(network, taking_values)
    try:
        yield twins
    except BaseException:
        twins.leave(failed=True)
        raise
    twins.leave()


def leave_static_twins(network: nn.Module, *_: Any) -> None:
    """Puts dynamic modules back before a state dict is loaded; a hook of a converted network.

    Args:
        network: A network whose dynamic modules may be replaced by static twins.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
    """
    twins = network.__dict__.get(_ACTIVE)
    if twins is not None:
        twins.leave()


def _copies(twin: nn.Module) -> list[Tensor]:
    # Not of what is in the twin, such as an attention's last layer: that is the module's own.
    own = twin.parameters(recurse=False)
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in own]


def _has_changed(twin: nn.Module, before: list[Tensor]) -> bool:
    return any(
        old.requires_grad != new.requires_grad or not torch.equal(old, new)
        for old, new in zip(before, twin.parameters(recurse=False))
    )


def has_values(dynamic: StandsForStatic) -> bool:
    """Whether this process has all values of a module: nothing is sharded or on ``meta``."""
    cells = [module.cells for module in dynamic.modules() if hasattr(module, 'cells')]
    return _are_whole(cells) and not any(tensor.is_meta for tensor in dynamic.parameters())


def _are_whole(cells: Iterable[Tensor]) -> bool:
    """Whether this process has all values of some cells."""
    return not any(modes.is_sharded(values) or values.is_meta for values in cells)
