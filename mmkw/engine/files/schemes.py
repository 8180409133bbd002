"""Loads checkpoints from all kinds of addresses that MMEngine knows, by :func:`read_checkpoint`.

The files are found and downloaded as by MMEngine. Only the reading differs.
"""

import io
import os
import os.path as osp
from collections.abc import Callable
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import urlparse

import mmengine
import torch
from mmengine.dist import get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint

from .contents import take

# Addresses of torchvision 0.12, which MMEngine keeps for the plain names.
TORCHVISION_URLS = osp.join(osp.dirname(mmengine.__file__), 'hub', 'torchvision_0.12.json')
_loaders: dict[tuple[str, ...], Callable] = {}


def _scheme(*prefixes: str) -> Callable[[Callable], Callable]:
    return lambda loader: _loaders.setdefault(prefixes, loader)


def take_place(theirs: ModuleType) -> None:
    """Replaces MMEngine's loaders.

    Args:
        theirs: The module ``mmengine.runner.checkpoint``.
    """
    for prefixes, loader in _loaders.items():
        # The function of the module is replaced, too, because other code calls it directly.
        setattr(theirs, loader.__name__, loader)
        theirs.CheckpointLoader.register_scheme(prefixes, loader, force=True)


def _read(
    source: str | BinaryIO, map_location: Any, name: str, folder: str | None = None
) -> dict[str, Any]:
    # Imported here, because MMEngine is incomplete when this module is imported.
    from ...checkpoints import read_checkpoint

    return take(read_checkpoint(source, map_location, name), name, folder)


@_scheme('')
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads a local file.

    Args:
        filename: Path of the file.
        map_location: As in ``torch.load``.
    """
    return _read(
        filename, map_location, filename, osp.dirname(osp.abspath(osp.expanduser(filename)))
    )


@_scheme('http://', 'https://')
def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Downloads a file to the folder of ``torch.hub``, if it is not there yet, and loads it.

    Args:
        filename: The address.
        map_location: As in ``torch.load``.
    """
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    path = osp.join(folder, osp.basename(urlparse(filename).path))
    rank, world_size = get_dist_info()

    def fetch() -> None:
        if not osp.exists(path):
            os.makedirs(folder, exist_ok=True)
            print_log(f'Downloading {filename} to {path}', logger='current')
            torch.hub.download_url_to_file(filename, path, progress=os.isatty(0))

    if rank == 0:
        fetch()
    if world_size > 1:
        torch.distributed.barrier()
        # Processes on other machines do not see the file of rank 0.
        fetch()
    return _read(path, map_location, f'{path} (of {filename})')


@_scheme('modelzoo://', 'torchvision://')
def load_from_torchvision(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads weights of torchvision.

    Args:
        filename: An address such as ``torchvision://resnet50``. Names such as
            ``torchvision://resnet50.imagenet1k_v2`` are torchvision's own: it must be installed.
        map_location: As in ``torch.load``.
    """
    try:
        urls = mmengine_checkpoint.get_torchvision_models()
    except (ImportError, RuntimeError, OSError) as error:
        # It is not installed, or built for another torch. The plain names are also in MMEngine.
        urls = mmengine.load(TORCHVISION_URLS)
        if filename.partition('://')[2] not in urls:
            raise ImportError(
                f'{filename}: torchvision is needed for this name, and it does not import '
                f'({error}). Install the one for your torch, from the same index: pip install '
                'torchvision, or on CPU pip install torchvision --index-url '
                'https://download.pytorch.org/whl/cpu'
            ) from error
    return load_from_http(_of(urls, filename), map_location)


@_scheme('open-mmlab://', 'openmmlab://')
def load_from_openmmlab(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads weights of OpenMMLab, or weights that are listed in MMEngine's home folder.

    Args:
        filename: An address such as ``open-mmlab://resnet50_caffe``.
        map_location: As in ``torch.load``.
    """
    urls = mmengine_checkpoint.get_external_models()
    renamed = mmengine_checkpoint.get_deprecated_model_names()
    urls.update({old: urls[new] for old, new in renamed.items() if new in urls})
    url = _of(urls, filename)
    if url.startswith(('http://', 'https://')):
        return load_from_http(url, map_location)
    return load_from_local(osp.join(mmengine_checkpoint._get_mmengine_home(), url), map_location)


@_scheme('mmcls://')
def load_from_mmcls(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads the backbone of a classifier of MMClassification.

    Args:
        filename: An address such as ``mmcls://resnet50``.
        map_location: As in ``torch.load``.
    """
    urls = mmengine_checkpoint.get_mmcls_models()
    checkpoint = load_from_http(_of(urls, filename), map_location)
    return mmengine_checkpoint._process_mmcls_checkpoint(checkpoint)


@_scheme(r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
def load_from_ceph(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads an object of a Ceph or S3 store, by MMEngine's Petrel backend.

    Args:
        filename: An address such as ``s3://bucket/epoch_12.pth``.
        map_location: As in ``torch.load``.
    """
    backend = get_file_backend(filename, backend_args=dict(backend='petrel'))
    return _read(io.BytesIO(backend.get(filename)), map_location, filename)


@_scheme('pavi://')
def load_from_pavi(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads a model from Pavi's cloud. The package ``pavi`` must be installed.

    Args:
        filename: An address such as ``pavi://model/epoch_12.pth``.
        map_location: As in ``torch.load``.
    """
    try:
        from pavi import modelcloud
    except ImportError as error:
        raise ImportError(f'{filename} needs the package pavi, which is not installed.') from error
    model = modelcloud.get(filename.removeprefix('pavi://'))
    with TemporaryDirectory() as folder:
        # The cloud chooses the name, which could point out of the folder. So only its last part is
        # used.
        path = osp.join(folder, osp.basename(model.name))
        model.download(path)
        return _read(path, map_location, filename)


def _of(urls: dict[str, str], filename: str) -> str:
    """The web address of a model."""
    name = filename.partition('://')[2]
    if name not in urls:
        raise KeyError(f'{filename}: MMEngine knows no such model, but {", ".join(sorted(urls))}.')
    return urls[name]
