"""Registries of mmkw: children of MMEngine's, with scope ``mmkw``.

MMEngine imports ``<scope>.registry`` when a config has a type such as ``mmkw.KWResNet``. On the
first look-up it imports the ``locations`` below. So a config needs no ``custom_imports``.
"""

import logging

from . import requirements

requirements.check_versions(requirements.NEEDED, requirements.OPTIONAL)

from mmengine.logging import print_log  # noqa: E402
from mmengine.registry import HOOKS as MMENGINE_HOOKS  # noqa: E402
from mmengine.registry import MODELS as MMENGINE_MODELS  # noqa: E402
from mmengine.registry import (  # noqa: E402
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import Registry  # noqa: E402

from .layers import (  # noqa: E402
    CondConv2d,
    DYConv2d,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    ODConv2d,
)

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmkw', locations=['mmkw.backbones'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmkw', locations=['mmkw.engine.hooks'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmkw',
    locations=['mmkw.engine.optimizers'],
)

for layer in (KWConv1d, KWConv2d, KWConv3d, KWLinear, DYConv2d, CondConv2d, ODConv2d):
    MODELS.register_module(module=layer)


class _ToMMEngine(logging.Handler):
    """Passes what mmkw logs to MMEngine's log."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(record.getMessage(), logger='current', level=record.levelno)


LOGGER = logging.getLogger('mmkw')
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False
LOGGER.addHandler(_ToMMEngine())
