"""Batches of images on which networks are compared: of a loader of MMEngine, or of tensors."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .networks import DenseNetwork, tensors_of


def check_loader(loader: Iterable) -> None:
    """Refuses what cannot be gone through several times.

    Args:
        loader: Batches of images.

    Raises:
        ValueError: If ``loader`` is no iterable, or an iterator.
    """
    if not isinstance(loader, Iterable) or iter(loader) is loader:
        raise ValueError(
            f'loader must be a DataLoader or a list of batches, got a {type(loader).__name__}: it '
            'is gone through several times.'
        )


def predict(network: nn.Module, batch: Any) -> Any:
    """Has a network compute all that it computes for the images of a batch.

    Args:
        network: A model of OpenMMLab's libraries, or any network of images.
        batch: For such a model a dict with ``inputs`` as its data loaders have; else images, or a
            list or tuple that begins with images.
    """
    if _is_of_mmengine(network, batch):
        # Predictions are written into what a batch holds.
        return _model_of(network).test_step(copy.deepcopy(batch))
    return network(_images(network, batch))


def dense_outputs(network: nn.Module, batch: Any) -> list[Tensor]:
    """What a network computes before boxes are chosen.

    Args:
        network: As in :func:`predict`.
        batch: As in :func:`predict`.

    Returns:
        The outputs of :class:`~mmkw.deploy.DenseNetwork`, or, where a model's head needs more than
        the images, its features. Of another network all its outputs.
    """
    if not _is_of_mmengine(network, batch):
        return tensors_of(network(_images(network, batch)))
    model = _model_of(network)
    images = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
    try:
        return tensors_of(DenseNetwork(model)(images))
    except (ValueError, TypeError):
        # There is no such head, or it has to be given the samples, too, as those with queries.
        return tensors_of(model.extract_feat(images))


def count_images(batch: Any) -> int:
    """How many images a batch has.

    Args:
        batch: As in :func:`predict`.
    """
    images = batch['inputs'] if isinstance(batch, Mapping) else _first(batch)
    return len(images)


def _model_of(network: nn.Module) -> Any:
    return network.model if isinstance(network, DenseNetwork) else network


def _is_of_mmengine(network: nn.Module, batch: Any) -> bool:
    if not isinstance(batch, Mapping):
        return False
    if not hasattr(_model_of(network), 'test_step'):
        raise ValueError(
            f'loader has dicts, which a {type(network).__name__} does not take. Give the whole '
            'model, or batches of images.'
        )
    return True


def _images(network: nn.Module, batch: Any) -> Tensor:
    images = _first(batch)
    parameter = next(network.parameters(), None)
    return images if parameter is None else images.to(parameter.device)


def _first(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, Tensor):
        raise ValueError(
            'loader must give images, lists that begin with images, or dicts of MMEngine, got a '
            f'{type(batch).__name__}.'
        )
    return images


def distance(network: nn.Module, other: nn.Module, loader: Iterable[Any]) -> float:
    """How far the outputs of two networks are apart.

    Args:
        network: The network that the other one is compared with.
        other: A network with the same outputs.
        loader: Batches of images.

    Returns:
        The Euclidean distance of an output over all images, relative to the length of the
        network's; the mean over the outputs.
    """
    sums: Any = 0.0
    for batch in loader:
        pairs = zip(dense_outputs(other, batch), dense_outputs(network, batch), strict=True)
        squares = [
            ((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in pairs
        ]
        sums = sums + torch.tensor(squares)
    apart, length = sums.unbind(1)
    return float((apart / length.clamp_min(1e-24)).sqrt().mean())
