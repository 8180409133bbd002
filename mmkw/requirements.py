"""The versions mmkw works with: read by ``setup.py``, checked on import.

Only the standard library is imported here, so that the check itself cannot fail on what it checks.
"""

import re
from importlib import metadata

# distribution -> (lowest version, first version too new, the version the tests run with)
SUPPORTED = {
    'torch': ('2.0', '2.14', '2.13.0'),
    'mmengine': ('0.10.0', '0.11', '0.10.7'),
    'mmcv': ('2.0.0', '2.2.0', '2.1.0'),
    'mmdet': ('3.0.0', '3.4', '3.3.0'),
    'mmsegmentation': ('1.0.0', '1.3', '1.2.2'),
}
# mmdet and mmsegmentation are extras: one of them is enough.
OPTIONAL = ('mmdet', 'mmsegmentation')


class UnsupportedVersionError(RuntimeError):
    """A dependency is missing or has a version that mmkw does not work with.

    Not an ``ImportError``: MMEngine's registries swallow those while they look for a scope, and the
    user would only hear that ``mmkw.KWResNet`` is not registered.
    """


def requirement(name: str) -> str:
    """Returns the pip requirement of a supported distribution, such as ``torch>=2.0,<2.14``."""
    low, high, _ = SUPPORTED[name]
    return f'{name}>={low},<{high}'


def _release(version: str) -> tuple[int, ...]:
    """Numbers of a version's release part: ``'2.13.0+cpu'`` -> ``(2, 13, 0)``."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match.group().split('.')) if match else ()


def fault_of(name: str) -> str | None:
    """What is wrong with an installed distribution, or with its absence.

    Args:
        name: Of :data:`SUPPORTED`.

    Returns:
        Both versions and the command that mends it; None where nothing is wrong.
    """
    low, high, tested = SUPPORTED[name]
    isolation = ' --no-build-isolation' if name == 'mmcv' else ''
    remedy = f"Run: pip install{isolation} '{name}=={tested}'"
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name in OPTIONAL:
            return None
        return f'mmkw needs {requirement(name)}, which is not installed. {remedy}'
    if not _release(low) <= _release(installed) < _release(high):
        return f'mmkw needs {requirement(name)}, but {name} {installed} is installed. {remedy}'
    return None


def check_versions() -> None:
    """Checks every installed dependency against :data:`SUPPORTED`.

    Raises:
        UnsupportedVersionError: With both versions and the command that mends it.
    """
    for name in SUPPORTED:
        if fault := fault_of(name):
            raise UnsupportedVersionError(fault)
