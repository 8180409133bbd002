"""The versions that mmkw works with. ``setup.py`` reads them, and the import checks them.

This module imports only the standard library, so that the check also works if a dependency fails.
"""

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple


class Range(NamedTuple):
    """The supported versions of a distribution.

    Attributes:
        low: The lowest version.
        high: The first version that is too new.
        tested: The version that the tests run with.
    """

    low: str
    high: str
    tested: str


# module -> the distributions that have it. OneDL maintains copies of OpenMMLab's libraries under
# names of its own.
SUPPORTED: dict[str, dict[str, Range]] = {
    'torch': {'torch': Range('2.6', '2.16', '2.13.0')},
    'mmengine': {
        'mmengine': Range('0.10.0', '0.11', '0.10.7'),
        'onedl-mmengine': Range('0.10.8', '0.11', '0.10.12'),
    },
    'mmcv': {
        'mmcv': Range('2.0.0', '2.2.0', '2.1.0'),
        'onedl-mmcv': Range('2.3.0', '2.4', '2.3.6'),
    },
    'mmdet': {
        'mmdet': Range('3.0.0', '3.4', '3.3.0'),
        'onedl-mmdetection': Range('3.4.0', '3.6', '3.5.1'),
    },
    'mmseg': {
        'mmsegmentation': Range('1.0.0', '1.3', '1.2.2'),
        'onedl-mmsegmentation': Range('1.3.0', '1.5', '1.4.2'),
    },
    'mmpretrain': {
        'mmpretrain': Range('1.0.0', '1.3', '1.2.0'),
        'onedl-mmpretrain': Range('1.3.0', '1.4', '1.3.6'),
    },
}
# The core needs torch alone. What joins it to OpenMMLab needs two more, and has use for the others.
NEEDED = ('torch', 'mmengine', 'mmcv')
OPTIONAL = ('mmdet', 'mmseg', 'mmpretrain')


class UnsupportedVersionError(RuntimeError):
    """A dependency is missing or has a version that mmkw does not work with.

    This is not an ``ImportError``, because MMEngine's registries ignore import errors while they
    look for a scope. The user would only read that ``mmkw.KWResNet`` is not registered.
    """


def requirement(distribution: str) -> str:
    """Returns the pip requirement of a supported distribution, such as ``torch>=2.6,<2.16``."""
    (found,) = (names[distribution] for names in SUPPORTED.values() if distribution in names)
    return f'{distribution}>={found.low},<{found.high}'


def version_of(module: str) -> str | None:
    """The version of an installed module, without importing it.

    Args:
        module: A name in :data:`SUPPORTED`.

    Returns:
        None if the module is not installed.
    """
    loaded = getattr(sys.modules.get(module), '__version__', None)
    if loaded is not None:
        return str(loaded)
    for distribution in SUPPORTED[module]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None if find_spec(module) is None else 'of an unknown version'


def fault_of(module: str, needed: bool = True) -> str | None:
    """Describes what is wrong with a module: it is missing, or of an unsupported version.

    Args:
        module: A name in :data:`SUPPORTED`.
        needed: Whether it is a fault if the module is missing.

    Returns:
        The needed version, the installed version, and the command to install a tested one. None if
        nothing is wrong.
    """
    ranges = SUPPORTED[module]
    installed = version_of(module)
    if installed is None and not needed:
        return None
    release = _release(installed or '')
    if any(_release(r.low) <= release < _release(r.high) for r in ranges.values()):
        return None
    isolation = ' --no-build-isolation' if module == 'mmcv' else ''
    commands = [f"pip install{isolation} '{name}=={r.tested}'" for name, r in ranges.items()]
    found = 'it is not installed' if installed is None else f'{module} {installed} is installed'
    return (
        f'mmkw needs {" or ".join(map(requirement, ranges))}, but {found}. '
        f'Run: {", or ".join(commands)}'
    )


def check_versions(needed: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Checks the versions of modules.

    Args:
        needed: Names in :data:`SUPPORTED` that must be installed.
        optional: Names of modules that may be missing.

    Raises:
        UnsupportedVersionError: If one is missing or unsupported; see :func:`fault_of`.
    """
    faults = [fault_of(module) for module in needed]
    faults += [fault_of(module, needed=False) for module in optional]
    for fault in filter(None, faults):
        raise UnsupportedVersionError(fault)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release part: ``'2.13.0+cpu'`` -> ``(2, 13, 0)``."""
    match = re.match(r'\d+(\.\d+)*', version)
    return tuple(int(part) for part in match.group().split('.')) if match else ()
