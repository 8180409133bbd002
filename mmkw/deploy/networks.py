"""What of a detector, segmentor or classifier is a network: tensors to tensors."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class DenseNetwork(nn.Module):
    """Backbone, neck and the head over all places of a model of OpenMMLab's libraries.

    What follows, such as choosing boxes, needs more than the images and is left to the library; see
    :class:`~mmkw.deploy.Detector`.

    Args:
        model: A detector, segmentor or classifier.

    Attributes:
        head: The name of the head in the model.
        is_two_stage: Whether heads over regions follow, which need the features, too.

    Raises:
        ValueError: If the model has no such head.

    Example:
        ``DenseNetwork(mmdet.apis.init_detector(config, checkpoint, device='cpu'))``
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        heads = ('decode_head', 'rpn_head', 'bbox_head', 'mask_head', 'head')
        names = [name for name in heads if isinstance(getattr(model, name, None), nn.Module)]
        if not names or hasattr(model, 'encoder'):
            raise ValueError(
                f'{type(model).__name__} has no head that is a function of the images alone. '
                'Export its backbone by mmkw.deploy.export(model.backbone, ...) or --backbone.'
            )
        self.head = names[0]
        self.is_two_stage = self.head == 'rpn_head' and hasattr(model, 'roi_head')

    def forward(self, images: Tensor) -> Any:
        """Maps images as the data preprocessor gives them to the outputs of the head.

        Args:
            images: Tensor[batch, channels, height, width].

        Returns:
            Logits of a segmentor or classifier; of a detector scores and boxes for each level. A
            detector of two stages has those of its proposals, and then the features of each level.
        """
        if not self.is_two_stage:
            return self.model(images, mode='tensor')
        features = self.model.extract_feat(images)
        return self.model.rpn_head(features), features


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Has networks compute as in evaluation, without gradients, and gives them back as they were.

    Args:
        *networks: Any networks.
    """
    training = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts.

    Args:
        outputs: Of a network, or arrays of a runtime.
    """
    leaves, _ = torch.utils._pytree.tree_flatten(outputs)
    return [torch.as_tensor(leaf) for leaf in leaves if leaf is not None]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of a value, relative to the largest magnitude in its tensor.

    Args:
        found: The tensors that are compared.
        expected: The tensors that they are compared with.

    Returns:
        At least 0; infinite if the shapes differ, or if a value is not a number.
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return math.inf
    return max(_difference(a.double(), b.double()) for a, b in zip(found, expected))


def _difference(found: Tensor, expected: Tensor) -> float:
    # Infinities may be equal. What is not a number equals nothing, and `max` could lose it.
    apart = torch.where(found == expected, 0, (found - expected).abs()).max()
    largest = torch.where(expected.isinf(), 0, expected.abs()).max().clamp_min(1e-12)
    return math.inf if apart.isnan() else float(apart / largest)
