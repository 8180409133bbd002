"""What other code sees of a dynamic layer: one call in a traced graph, and no weight."""

from typing import Any

from torch import nn
from torch.fx import Proxy

from ..ops import modes


def recorded(module: nn.Module, *inputs: Any) -> Proxy:
    """Records one call of a module in the graph that ``torch.fx`` is tracing.

    Its tracers look into every module that is not of ``torch.nn``. A dynamic layer is one call, as
    its static twin. Before it the graph passes the first input through the network's
    ``warehouse_manager``, which gives it back: so the traced network has the cells among its
    parameters.

    Args:
        module: A dynamic layer, or a module with some, of the network that is traced.
        *inputs: Of its forward pass; one is a proxy.

    Returns:
        The result of the call.

    Raises:
        RuntimeError: If the module has hooks. They are being traced, and would run in the call too.
    """
    tracer = next(value.tracer for value in inputs if modes.is_symbolic(value))
    name = tracer.path_of_module(module)
    if modes.is_hooked_by_others(module):
        raise RuntimeError(
            f'{name}, a {type(module).__name__}, has forward hooks, which torch.fx would record '
            'and call once more in the layer. Remove them, trace, and register them on the result.'
        )
    first, *others = inputs
    managers = (m for layer in module.modules() for m in getattr(layer, '_warehouses', ()))
    for manager in dict.fromkeys(managers):
        try:
            owner = tracer.path_of_module(manager)
        except NameError:
            continue  # A part of a network is traced; its parameters are without the cells too.
        if not owner.startswith(f'{name}.'):
            # Not by create_proxy: tools that name the calls by their layer have it count them.
            arguments = tracer.create_arg((first,))
            first = tracer.proxy(tracer.create_node('call_module', owner, arguments, {}))
    return tracer.create_proxy('call_module', name, (first, *others), {})


class Weightless(nn.Module):
    """Says why a dynamic layer has no ``weight``, and is no script, when it is asked for them."""

    def __getattr__(self, name: str) -> Any:
        # Only what the normal ways have not found comes here.
        if name == 'weight':
            raise AttributeError(self._no_weight())
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter, but no ``weight``, which would have no effect."""
        if name == 'weight' and param is not None:
            raise AttributeError(self._no_weight())
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> None:
        # torch.jit.script asks every module of a network for what it is to compile.
        raise TypeError(
            f'torch.jit.script cannot compile a {type(self).__name__}, whose kernel is mixed by '
            'code that is no TorchScript. Use torch.export, torch.compile or torch.jit.trace.'
        )

    def _no_weight(self) -> str:
        return (
            f'{type(self).__name__} has no weight of its own: its kernel is mixed for every image '
            'from the cells of a warehouse. To prune, parametrise or read these, take '
            "warehouse_manager.weights and the warehouse's index, such as '0'; for anything else "
            'that needs a weight, such as fusing with a BatchNorm, leave this layer static.'
        )
