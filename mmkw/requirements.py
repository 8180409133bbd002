"""The versions that mmkw works with. ``setup.py`` reads them, and the import checks them.

This module imports only the standard library, so that the check also works if a dependency fails.
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

    This is not an ``ImportError``, because MMEngine's registries ignore import errors while they
    look for a scope. The user would only read that ``mmkw.KWResNet`` is not registered.
    """


def requirement(name: str) -> str:
    """Returns the pip requirement of a supported distribution, such as ``torch>=2.0,<2.14``."""
    low, high, _ = SUPPORTED[name]
    return f'{name}>={low},<{high}'


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release part: ``'2.13.0+cpu'`` -> ``(2, 13, 0)``."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match.group().split('.')) if match else ()


def fault_of(name: str) -> str | None:
    """Describes what is wrong with a distribution: it is missing, or of an unsupported version.

    Args:
        name: A name in :data:`SUPPORTED`.

    Returns:
        The needed version, the installed version, and the command to install a tested one. None if
        nothing is wrong.
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
        UnsupportedVersionError: If one is missing or unsupported; see :func:`fault_of`.
    """
    for name in SUPPORTED:
        if fault := fault_of(name):
            raise UnsupportedVersionError(fault)
