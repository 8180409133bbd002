"""How a dynamic layer looks to other code: one call in a traced graph, and no ``weight``."""

from typing import Any

from torch import nn

from ..ops import modes


def recorded(module: nn.Module, *inputs: Any) -> Any:
    """Records one call of a module in the graph that ``torch.fx`` is tracing.

    The tracers of ``torch.fx`` record what happens inside every module outside ``torch.nn``. This
    function makes a dynamic layer one call in the graph, as a static layer is. Before this call,
    the graph passes the first input through ``warehouse_manager``, which returns it unchanged. So
    the parameters of the traced network include the cells.

    Args:
        module: A dynamic layer of the traced network, or a module that contains dynamic layers.
        *inputs: The inputs of the module's forward pass. At least one is a proxy.

    Returns:
        The result of the call.

    Raises:
        RuntimeError: If the module has hooks. ``torch.fx`` would record the hooks, and the call
            would run them once more.
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
            continue  # Only a part of the network is traced, and this part does not own the cells.
        if not owner.startswith(f'{name}.'):
            # Tools override create_proxy to count and name the calls of layers. This call is none.
            arguments = tracer.create_arg((first,))
            first = tracer.proxy(tracer.create_node('call_module', owner, arguments, {}))
    return tracer.create_proxy('call_module', name, (first, *others), {})


def no_weight(module: nn.Module) -> str:
    """The message of an error, where a weight is expected.

    Args:
        module: A dynamic layer, or a module that contains one and stands for one layer.
    """
    return (
        f'{type(module).__name__} has no weight of its own: its kernel is mixed for every image '
        'from the cells of a warehouse. To prune, parametrise or read these, take '
        "warehouse_manager.weights and the warehouse's index, such as '0'; for anything else "
        'that needs a weight, such as fusing with a BatchNorm, leave this layer static.'
    )


class Weightless(nn.Module):
    """Explains in errors why a dynamic layer has no ``weight`` and cannot be scripted."""

    def __getattr__(self, name: str) -> Any:
        # Python calls this method only if the attribute was not found otherwise.
        if name == 'weight':
            raise AttributeError(no_weight(self))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. Refuses a ``weight``, as :meth:`register_parameter` does."""
        if name == 'weight' and value is not None:
            raise AttributeError(no_weight(self))
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter. Refuses a ``weight``, because it would have no effect."""
        if name == 'weight' and param is not None:
            raise AttributeError(no_weight(self))
        super().register_parameter(name, param)

    def __prepare_scriptable__(self) -> None:
        # torch.jit.script calls this method of every module that it compiles.
        raise TypeError(
            f'torch.jit.script cannot compile a {type(self).__name__}, whose kernel is mixed by '
            'code that is no TorchScript. Use torch.export, torch.compile or torch.jit.trace.'
        )
