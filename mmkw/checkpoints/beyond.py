"""What published files hold beyond a backbone."""

from collections.abc import Collection

from torch import Tensor

# The ImageNet classifier, and the last convolution of MobileNetV2, which MMSegmentation leaves out.
PARTS = ('fc', 'head', 'norm', 'classifier', 'conv2')


def beyond_backbone(
    state_dict: dict[str, Tensor], prefix: str, warehouses: int, own: Collection[str] = ()
) -> list[str]:
    """The names of an ImageNet classifier, or what else a published file has beyond a backbone.

    Args:
        state_dict: Of a backbone with more.
        prefix: The backbone's place in it.
        warehouses: How many the backbone has; a dynamic classifier's own is the next.
        own: Names that do belong to the backbone.
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
