"""Names of this package in MMEngine: ``mmkw::CONFIG``, and the names of models for inferencers.

MMEngine looks for both in tables and folders of OpenMMLab's packages. Our configs are in
``mmkw/.mim``, as those of OpenMMLab's packages are in their ``.mim``.
"""

import logging
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

MIM = Path(__file__).parents[1] / '.mim'


def take_place(theirs: ModuleType) -> None:
    """Has MMEngine find the configs and the models of mmkw.

    Args:
        theirs: The module ``mmengine.config.utils``, ``mmengine.config.config`` or
            ``mmengine.infer.infer``.
    """
    if theirs.__name__ == 'mmengine.config.utils':
        # MMEngine takes the folder of a distribution of this name, which is wrong in an editable
        # installation, or else of a module. So this is a module of ours, which is always right.
        theirs.MODULE2PACKAGE['mmkw'] = 'mmkw.autoload'
        # OneDL's MMEngine looks for ``mmseg::`` in OpenMMLab's distribution, which is not there.
        if not list(metadata.distributions(name=theirs.MODULE2PACKAGE['mmseg'])):
            theirs.MODULE2PACKAGE['mmseg'] = 'mmseg'
        # MMEngine reads all metafiles of a library, a hundred, for every base of a config.
        vars(theirs)['load'] = cache(theirs.load)
    elif theirs.__name__ == 'mmengine.config.config':
        theirs.Config._get_cfg_path = staticmethod(_base_finder(theirs.Config._get_cfg_path))
    else:
        inferencer = theirs.BaseInferencer
        inferencer._load_model_from_metafile = _model_finder(inferencer._load_model_from_metafile)


def config_path(name: str) -> Path:
    """The file of a config that comes with mmkw.

    Args:
        name: Path below ``configs``: ``mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py``.

    Raises:
        FileNotFoundError: If there is no such config. The message names similar ones.
    """
    folder = MIM / 'configs'
    if (folder / name).is_file():
        return folder / name
    known = [path.relative_to(folder).as_posix() for path in folder.glob('*/**/*.py')]
    similar = get_close_matches(name, known, cutoff=0.4) or sorted(known)
    raise FileNotFoundError(f'mmkw has no config {name!r}, but {", ".join(similar)}')


def model_of(name: str) -> dict[str, Any] | None:
    """Finds a model of mmkw by its name.

    Args:
        name: As in ``model-index.yml``, in any case: ``mask-rcnn_kw1x-r50_fpn_adamw-1x_coco``.

    Returns:
        Its entry, with ``Config`` relative to :data:`MIM`; None if there is no such model.

    Example:
        ``model_of('mask-rcnn_kw1x-r50_fpn_adamw-1x_coco')['Config']``
    """
    index = yaml.safe_load((MIM / 'model-index.yml').read_text())
    for metafile in index['Import']:
        for model in yaml.safe_load((MIM / metafile).read_text())['Models']:
            if model['Name'].lower() == name.lower():
                return model
    return None


def _base_finder(others: Callable) -> Callable:
    """MMEngine's function that finds the files of ``_base_``, preceded by ours."""

    # MMEngine lists all installed distributions anew for each. What is not found is not remembered.
    @cache
    def of_another_package(cfg_path: str) -> tuple[str, str | None]:
        return others(cfg_path, '')

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, external, name = cfg_path.partition('::')
        if not external:
            return others(cfg_path, filename)
        if package != 'mmkw':
            return of_another_package(cfg_path)
        # Without a scope: types without a prefix are those of the library of the config.
        return str(config_path(name)), None

    return _get_cfg_path


def _model_finder(others: Callable) -> Callable:
    """MMEngine's method of inferencers that finds models by name, preceded by ours."""

    def _load_model_from_metafile(self: Any, model: str) -> tuple[Any, str | None]:
        # Imported here, because MMEngine is incomplete when this module is imported.
        from mmengine.config import Config
        from mmengine.logging import print_log

        found = model_of(model)
        if found is None:
            return others(self, model)
        print_log(
            f'{found["Name"]}, weights: {found["Weights"].rstrip("/")}. Give the inferencer '
            'weights=FILE; without, the network is random.',
            logger='current',
            level=logging.WARNING,
        )
        return Config.fromfile(MIM / found['Config']), None

    return _load_model_from_metafile
