"""Asks PyTorch how it runs the code: compiled, traced, under autocast, in a backward pass.

PyTorch's private names, and names that differ between its releases, are in this module only.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.prune import BasePruningMethod

# BatchNorms of all dimensions, also those that MMEngine makes from a SyncBatchNorm.
BATCH_NORM = nn.modules.batchnorm._BatchNorm

# In the names of modules inside one that `apply_activation_checkpointing` puts around them. Their
# state dicts have names without it.
CHECKPOINTED = '_checkpoint_wrapped_module.'

_PLAIN = (Tensor, nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision to which autocast casts a tensor; None outside autocast."""
    device = x.device.type
    if not _autocasts(device):
        return None
    if x.dtype == torch.float64 or not x.is_floating_point():
        # Autocast leaves double precision as it is, and what are no real numbers.
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Switches autocast off where a tensor is, if it is on.

    Args:
        x: Any tensor.
    """
    device = x.device.type
    # Switching off what is off takes as long as a small layer.
    if not _autocasts(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _autocasts(device: str) -> bool:
    # torch has no autocast for the meta device.
    return device != 'meta' and torch.is_autocast_enabled(device)


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records PyTorch's own operators."""
    # torch 2.6 cannot tell exporting from compiling.
    exporting = getattr(torch.compiler, 'is_exporting', is_compiling)
    return is_tracing() or exporting()


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is tracing, for itself or for PyTorch's older ONNX exporter."""
    return torch.jit.is_tracing()


def is_surely_exporting() -> bool:
    """Whether ``torch.export`` is tracing. In torch 2.6 this cannot be told: False."""
    return hasattr(torch.compiler, 'is_exporting') and torch.compiler.is_exporting()


def makes_graph() -> bool:
    """Whether ``torch.compile`` makes a graph, in which an operator of our own may be."""
    return is_compiling() and not is_exporting() and not is_transforming()


def is_transforming() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is running."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def is_observed() -> bool:
    """Whether something looks at the operators inside a call."""
    return (
        is_compiling()
        or is_tracing()
        or is_transforming()
        # A dispatch mode is active: fake tensors, a tracer, or a counter of operations.
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_seen_through(*tensors: Tensor) -> bool:
    """Whether something looks at the operators inside a call, or the tensors have no values.

    Args:
        *tensors: The call's operands.
    """
    return is_observed() or not all(map(is_plain, tensors))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values: no subclass, not on the meta device, no batch of gradients.

    Args:
        tensor: Any tensor.
    """
    return type(tensor) in _PLAIN and not tensor.is_meta and not _is_batched(tensor)


def is_patched(*modules: nn.Module) -> bool:
    """Whether one of some modules computes something else than its class: by hooks, or its forward.

    Hooks for all modules count, too, and those on the backward pass.

    Args:
        *modules: Any modules.
    """
    for module in modules:
        own = module.__dict__
        if (
            own['_forward_hooks']
            or own['_forward_pre_hooks']
            or own['_backward_hooks']
            or own['_backward_pre_hooks']
            or 'forward' in own
        ):
            return True
    every = nn.modules.module
    return bool(
        every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def computing_hooks(module: nn.Module) -> list[Callable]:
    """The forward pre-hooks that compute a module's parameters, such as those of pruning.

    Args:
        module: Any module.

    Returns:
        The hooks. They change only the parameters.
    """
    hooks = module._forward_pre_hooks.values()
    return [
        hook
        for hook in hooks
        if isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith('torch.nn.utils')
    ]


def is_hooked_by_others(module: nn.Module) -> bool:
    """Whether a module has hooks other than :func:`computing_hooks`.

    Args:
        module: Any module.
    """
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return hooks > len(computing_hooks(module))


def is_symbolic(value: Any) -> bool:
    """Whether ``torch.fx`` is tracing: then the operands of a call are of class ``Proxy``.

    Args:
        value: An operand.
    """
    return isinstance(value, Proxy)


def hand_hooks_on(module: nn.Module, successor: nn.Module) -> None:
    """Gives the hooks on a module's forward and backward pass to the one that takes its place.

    Args:
        module: Any module. It shares its hooks with the other from now on, also those to come.
        successor: A module without hooks of its own.
    """
    vars(successor).update(hooks_of(module))
    successor._is_full_backward_hook = module._is_full_backward_hook


def hooks_of(module: nn.Module) -> dict[str, dict]:
    """The hooks on a module's forward and backward pass, by the attributes that hold them.

    Args:
        module: Any module.
    """
    return {
        name: hooks
        for name, hooks in vars(module).items()
        if name.startswith(('_forward_', '_backward_'))
    }


def pre_hooks_of(module: nn.Module, kind: type) -> list[Any]:
    """The hooks of a class that run before a module's forward pass.

    Args:
        module: Any module.
        kind: Class of the hooks.
    """
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)]


def remove_pre_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Removes hooks that run before a module's forward pass.

    Args:
        module: Any module.
        kinds: Classes of the hooks. A hook may also be a method of an object of such a class.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kinds) or isinstance(getattr(hook, '__self__', None), kinds):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def padding_before(convolution: nn.Module) -> list[int]:
    """What a convolution of ``torch.nn`` pads its input with before it computes.

    It does so if its ``padding_mode`` is not ``'zeros'``, by what was its padding when it was made.

    Args:
        convolution: Of ``torch.nn``, or of a class derived from it.

    Returns:
        For ``torch.nn.functional.pad``.
    """
    return list(convolution._reversed_padding_repeated_twice)


def pad_before(convolution: nn.Module, padding: list[int]) -> None:
    """Has a convolution pad as another one; see :func:`padding_before`.

    Args:
        convolution: Of ``torch.nn``.
        padding: Of the other one.
    """
    convolution._reversed_padding_repeated_twice = padding


def reshaped(temporary: Tensor, shape: Sequence[int]) -> Tensor:
    """Changes the shape of a temporary tensor without making a view.

    Activations after a layer may change its result in place. Autograd does not allow that for a
    view that a function returns.

    Args:
        temporary: A contiguous tensor that nothing else uses.
        shape: The new shape, with as many values.
    """
    if is_exporting():
        # Exporters and runtimes do not know PyTorch's own operator for this.
        return temporary.reshape(shape)
    return torch.ops.aten._unsafe_view(temporary, shape)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a part of the cells, by ``fully_shard`` or by FSDP.

    Args:
        tensor: Cells. FSDP makes them flat; whole cells have at least four dimensions.
    """
    return tensor.dim() < 2 or hasattr(tensor, 'device_mesh')


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def will_run(node: Any) -> bool:
    """Whether the backward pass that runs in this thread will reach a node of its graph.

    Args:
        node: The node, a ``grad_fn``.
    """
    return torch._C._will_engine_execute_node(node)


def scan(step: Callable, state: Tensor, operands: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A loop over the first dimension of some tensors, as one operator of an exported program.

    Args:
        step: ``state, operands of one -> state, result of one``.
        state: The first state.
        operands: Tensors of the same length.

    Returns:
        The last state, and the stacked results.
    """
    # Imported here, because only exporting needs it.
    from torch._higher_order_ops.scan import scan as scan_function
    from torch._higher_order_ops.scan import scan_op

    if torch.compiler.is_dynamo_compiling() or 'dim' in signature(scan_op.__call__).parameters:
        # The operator of torch 2.6 takes other arguments.
        return scan_function(step, state, operands)

    def flat(state: Tensor, *operands: Tensor) -> list[Tensor]:
        return list(step(state, operands))

    # The function would compile every step, which takes half of the time of exporting.
    last, results = scan_op(flat, [state], list(operands), ())
    return last, results
