"""Finds the tensors of published files that do not belong to a backbone."""

from collections.abc import Collection

from torch import Tensor

# The ImageNet classifier, and the last convolution of MobileNetV2, which MMSegmentation lacks.
PARTS = ('fc', 'head', 'norm', 'classifier', 'conv2')


def beyond_backbone(
    state_dict: dict[str, Tensor], prefix: str, warehouses: int, own: Collection[str] = ()
) -> list[str]:
    """The names of tensors beyond the backbone, such as an ImageNet classifier.

    Args:
        state_dict: The state dict of a whole published network.
        prefix: The backbone's place in the state dict.
        warehouses: Number of warehouses of the backbone. The next index is the warehouse of a
            dynamic classifier.
        own: The names in :data:`PARTS` that belong to the backbone.
    """
    parts = set(PARTS) - set(own)
    names = [
        key
        for key in state_dict
        if key.startswith(prefix) and key[len(prefix) :].partition('.')[0] in parts
    ]
    if any(key.startswith(f'{prefix}classifier.') and '.attention.' in key for key in names):
        names.append(f'{prefix}warehouse_manager.weights.{warehouses}')
    return [name for name in names if name in state_dict]
