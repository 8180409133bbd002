"""How PyTorch is running the code: names that differ between its releases, in one place."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The precision that autocast asks for on a tensor's device; None outside of autocast."""
    device = x.device.type
    if device == 'meta':
        return None
    if hasattr(torch, 'get_autocast_dtype'):
        enabled = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if enabled else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing."""
    compiler = getattr(torch, 'compiler', None)
    if hasattr(compiler, 'is_compiling'):
        return compiler.is_compiling()
    return torch._dynamo.is_compiling()


def is_exporting() -> bool:
    """Whether ``torch.export`` or a tracer that looks for PyTorch's own operators is at work."""
    compiler = getattr(torch, 'compiler', None)
    return torch.jit.is_tracing() or (
        compiler.is_exporting() if hasattr(compiler, 'is_exporting') else is_compiling()
    )


def is_transforming() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )
