"""What of a detector, segmentor or classifier is a network: tensors to tensors."""

from typing import Any

from torch import Tensor, nn


class DenseNetwork(nn.Module):
    """Backbone, neck and the head over all places of a model of OpenMMLab's libraries.

    What follows, such as choosing boxes, needs more than the images and is left to the library.

    Args:
        model: A detector, segmentor or classifier.

    Raises:
        ValueError: If the model has no such head.

    Example:
        ``DenseNetwork(mmdet.apis.init_detector(config, checkpoint, device='cpu'))``
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        heads = ('decode_head', 'rpn_head', 'bbox_head', 'head')
        names = [name for name in heads if isinstance(getattr(model, name, None), nn.Module)]
        if not names or hasattr(model, 'encoder'):
            raise ValueError(
                f'{type(model).__name__} has no head that is a function of the images alone. '
                'Export its backbone by mmkw.deploy.export(model.backbone, ...) or --backbone.'
            )
        self._head = names[0]

    def forward(self, images: Tensor) -> Any:
        """Maps images as the data preprocessor gives them to the outputs of the head.

        Args:
            images: Tensor[batch, channels, height, width].

        Returns:
            Logits of a segmentor or classifier; of a detector scores and boxes for each level.
        """
        return getattr(self.model, self._head)(self.model.extract_feat(images))
