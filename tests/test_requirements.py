"""The version check: both versions and the remedy in one message."""

from importlib import metadata

import pytest

from mmkw import requirements


def fake(monkeypatch, **versions):
    real = metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(requirements.metadata, 'version', version)


@pytest.mark.parametrize(
    'name, version, needed, remedy',
    [
        ('torch', '1.13.1+cu117', 'torch>=2.0,<2.14', "pip install 'torch==2.13.0'"),
        ('mmcv', '2.2.0', 'mmcv>=2.0.0,<2.2.0', "pip install --no-build-isolation 'mmcv==2.1.0'"),
        ('mmengine', '0.9.1', 'mmengine>=0.10.0,<0.11', "pip install 'mmengine==0.10.7'"),
        ('mmdet', '2.28.2', 'mmdet>=3.0.0,<3.4', "pip install 'mmdet==3.3.0'"),
        ('mmsegmentation', '0.30.0', 'mmsegmentation>=1.0.0,<1.3', 'mmsegmentation==1.2.2'),
    ],
)
def test_an_unsupported_version_is_refused(monkeypatch, name, version, needed, remedy):
    fake(monkeypatch, **{name: version})
    with pytest.raises(requirements.UnsupportedVersionError) as error:
        requirements.check_versions()
    assert f'needs {needed}, but {name} {version} is installed' in str(error.value)
    assert remedy in str(error.value)


@pytest.mark.parametrize('name', ['torch', 'mmengine', 'mmcv'])
def test_a_missing_requirement_is_named(monkeypatch, name):
    fake(monkeypatch, **{name: None})
    with pytest.raises(requirements.UnsupportedVersionError, match=f'{name}.*is not installed'):
        requirements.check_versions()


def test_mmdet_and_mmseg_are_optional(monkeypatch):
    fake(monkeypatch, mmdet=None, mmsegmentation=None)
    requirements.check_versions()


def test_local_and_development_versions_count_by_their_release(monkeypatch):
    fake(monkeypatch, torch='2.1.0a0+git1234', mmdet='3.3.0rc1')
    requirements.check_versions()


def test_the_registries_do_not_swallow_the_error():
    """MMEngine ignores ImportErrors while it looks for a scope."""
    assert not issubclass(requirements.UnsupportedVersionError, (ImportError, AttributeError))
