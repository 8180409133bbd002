"""Whole detectors: the network as a file, all else by MMDetection's own code."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .networks import DenseNetwork, difference, evaluating, tensors_of
from .runtimes import onnx_session

# The file is compared with the model once. Half precision is less exact.
TOLERANCE = 0.05


class Detector:
    """A detector of MMDetection with its backbone, neck and dense head in ONNX Runtime.

    The test pipeline, choosing boxes, and in detectors of two stages all that follows the proposals
    are the model's own, in PyTorch. So the results are those of
    ``mmdet.apis.inference_detector(model, images)``.

    Args:
        model: The detector, as of ``mmdet.apis.init_detector``, of one or two stages, static or
            dynamic. It is not changed, and not needed afterwards.
        file: An ``.onnx`` file of ``mmkw.deploy.export(DenseNetwork(model), ...)`` or ``mmkw
            export``.

    Attributes:
        model: The detector without backbone and neck. It predicts as any: ``test_step`` takes
            batches.

    Raises:
        ValueError: If the model is of another kind, or if the file does not compute what its
            network does.
        ModuleNotFoundError: If ONNX Runtime is not installed.

    Example:
        ``Detector(init_detector(config, checkpoint, device='cpu'), 'network.onnx')('image.jpg')``
    """

    def __init__(self, model: nn.Module, file: str | Path) -> None:
        network = DenseNetwork(model)
        if network.head not in ('rpn_head', 'bbox_head', 'mask_head'):
            raise ValueError(
                f'model must be a detector of MMDetection, got a {type(model).__name__}.'
            )
        self._run, shape = onnx_session(file)
        self._shape = [side if isinstance(side, int) else None for side in shape]
        self._file = file
        self._structure = self._compared(network)
        # What the file computes is not copied.
        left_out = {id(part): None for part in (model.backbone, getattr(model, 'neck', None))}
        self.model: Any = copy.deepcopy(model, left_out)
        self.model.eval()
        self._outputs: Any = None
        self.model.extract_feat = self._extract_feat
        getattr(self.model, network.head).forward = lambda features: self._outputs
        self._is_two_stage = network.is_two_stage

    def __call__(self, images: Any) -> Any:
        """Finds what is in images.

        Args:
            images: A file's name, an array of height, width and the channels blue, green and red,
                or a list of them.

        Returns:
            A ``DetDataSample``, or a list of them for a list, as ``inference_detector`` does.
        """
        from mmdet.apis import inference_detector

        return inference_detector(self.model, images)

    def _extract_feat(self, images: Tensor) -> Any:
        """Runs the whole file; the head's outputs are kept for the head."""
        expected = [own or side for own, side in zip(self._shape, images.shape)]
        if expected != list(images.shape):
            raise ValueError(
                f'{self._file} takes images of {tuple(expected)}, and the pipeline gives '
                f'{tuple(images.shape)}. Export it with dynamic batch and size.'
            )
        found = tensors_of(self._run(images))
        outputs = torch.utils._pytree.tree_unflatten(found, self._structure)
        self._outputs, features = outputs if self._is_two_stage else (outputs, ())
        return features

    def _compared(self, network: DenseNetwork) -> Any:
        """Compares the file with the network for an image; returns how the outputs are nested."""
        fixed = [own or side for own, side in zip(self._shape, (1, 3, 128, 128))]
        images = torch.randn(fixed, generator=torch.Generator().manual_seed(0))
        with evaluating(network):
            outputs = network(images)
        apart = difference(tensors_of(self._run(images)), tensors_of(outputs))
        if not apart <= TOLERANCE:
            raise ValueError(
                f'{self._file} does not compute what the {type(network.model).__name__} does: its '
                f'outputs differ by {apart:.2g}. For a static file give the static network of '
                'mmkw.deploy.to_static.'
            )
        return torch.utils._pytree.tree_structure(outputs)
