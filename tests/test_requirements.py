"""The version check: both versions and the remedy in one message."""

import sys
from importlib import metadata

import pytest

from mmkw import requirements
from mmkw.requirements import NEEDED, OPTIONAL, SUPPORTED

NAMES = [(module, name) for module, names in SUPPORTED.items() for name in names]


def fake(monkeypatch, **installed):
    """Lets modules be installed as a version of a distribution, or not at all."""
    for module in installed:
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(sys.modules.get(module), '__version__', raising=False)
    given = dict(value for value in installed.values() if value is not None)
    own = {name for module in installed for name in SUPPORTED[module]}
    real, find = metadata.version, requirements.find_spec

    def version(name):
        if name in own and name not in given:
            raise metadata.PackageNotFoundError(name)
        return given[name] if name in given else real(name)

    monkeypatch.setattr(requirements.metadata, 'version', version)
    monkeypatch.setattr(
        requirements, 'find_spec', lambda name: None if name in installed else find(name)
    )


@pytest.mark.parametrize(
    'module, name, version, needed, remedy',
    [
        ('torch', 'torch', '1.13.1+cu117', 'torch>=2.6,<2.16', "pip install 'torch==2.13.0'"),
        (
            'mmcv',
            'mmcv',
            '2.2.0',
            'mmcv>=2.0.0,<2.2.0 or onedl-mmcv>=2.3.0,<2.4',
            "pip install --no-build-isolation 'mmcv==2.1.0', or pip install",
        ),
        ('mmengine', 'mmengine', '0.9.1', 'mmengine>=0.10.0,<0.11', "'mmengine==0.10.7'"),
        ('mmdet', 'mmdet', '2.28.2', 'mmdet>=3.0.0,<3.4', "pip install 'mmdet==3.3.0'"),
        ('mmseg', 'mmsegmentation', '0.30.0', 'mmsegmentation>=1.0.0', 'mmsegmentation==1.2.2'),
        ('mmpretrain', 'onedl-mmpretrain', '1.9', 'mmpretrain>=1.0.0', 'mmpretrain==1.2.0'),
    ],
)
def test_an_unsupported_version_is_refused(monkeypatch, module, name, version, needed, remedy):
    fake(monkeypatch, **{module: (name, version)})
    with pytest.raises(requirements.UnsupportedVersionError) as error:
        requirements.check_versions(NEEDED, OPTIONAL)
    assert f'needs {needed}' in str(error.value)
    assert f'but {module} {version} is installed' in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize('module, name', NAMES)
def test_the_tested_version_of_every_distribution_is_supported(monkeypatch, module, name):
    fake(monkeypatch, **{module: (name, SUPPORTED[module][name].tested)})
    assert requirements.version_of(module) == SUPPORTED[module][name].tested
    assert requirements.fault_of(module) is None


@pytest.mark.parametrize('name', NEEDED)
def test_a_missing_requirement_is_named(monkeypatch, name):
    fake(monkeypatch, **{name: None})
    with pytest.raises(requirements.UnsupportedVersionError, match=f'{name}.*is not installed'):
        requirements.check_versions(NEEDED)


def test_what_has_use_for_the_rest_of_openmmlab_does_without(monkeypatch):
    fake(monkeypatch, **dict.fromkeys(OPTIONAL))
    requirements.check_versions(NEEDED, OPTIONAL)


def test_local_and_development_versions_count_by_their_release(monkeypatch):
    fake(monkeypatch, torch=('torch', '2.6.0a0+git1234'), mmdet=('mmdet', '3.3.0rc1'))
    requirements.check_versions(NEEDED, OPTIONAL)


def test_the_imported_module_counts(monkeypatch):
    """Two distributions may have the same module."""
    import torch

    monkeypatch.setattr(torch, '__version__', '1.0')
    assert 'torch 1.0 is installed' in requirements.fault_of('torch')


def test_the_registries_do_not_swallow_the_error():
    """MMEngine ignores ImportErrors while it looks for a scope."""
    assert not issubclass(requirements.UnsupportedVersionError, (ImportError, AttributeError))


def test_a_requirement_of_pip():
    assert requirements.requirement('onedl-mmdetection') == 'onedl-mmdetection>=3.4.0,<3.6'
