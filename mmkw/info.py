"""``mmkw info`` prints the installed versions and which kernels compute."""

import platform
from pathlib import Path

from . import requirements
from .version import __version__


def report() -> str:
    """Reports the installed versions, unsupported versions, and which kernels compute.

    Returns:
        Lines, each with a name and its description.

    Example:
        ``import mmkw.info; print(mmkw.info.report())``, or ``mmkw info`` in a shell.
    """
    lines = [
        ('mmkw', f'{__version__}, in {Path(__file__).parent}'),
        ('python', f'{platform.python_version()}, {platform.platform()}'),
    ]
    for name in requirements.SUPPORTED:
        fault = requirements.fault_of(name, needed=False)
        lines.append((name, fault or requirements.version_of(name) or 'not installed'))
    lines += _of_operators()
    width = max(len(name) for name, _ in lines)
    return '\n'.join(f'{name:{width}}  {text}' for name, text in lines)


def _of_operators() -> list[tuple[str, str]]:
    try:
        import torch

        from .ops import backend
        from .ops.compiled import cpu_level, has_bfloat16
    except ImportError as error:
        return [('compiled kernels', f'not used: {error}')]
    missing = backend.why_not_compiled()
    used = None
    if missing is None:
        half = ' and its products of bfloat16' if has_bfloat16() else ''
        used = f'used on the CPU, for {cpu_level()}{half}'
    gpu = 'none'
    if torch.cuda.is_available():
        lacking = backend.why_no_gpu_kernels()
        kernels = 'used' if lacking is None else f'not used: {lacking}'
        gpu = f'{torch.cuda.get_device_name()}, kernels for it {kernels}'
    return [
        ('compiled kernels', used or f'not used: {missing}'),
        (
            'PyTorch',
            f'{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}',
        ),
        ('GPU', gpu),
    ]
