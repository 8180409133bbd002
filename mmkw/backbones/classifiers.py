"""Translates ImageNet files, which hold a whole network, to names of mmpretrain's classifiers."""

import re
from typing import Any

from torch import Tensor

from ..checkpoints import stored_warehouses

# What the authors, torchvision and the original ConvNeXt call the classifier.
_CLASSIFIER = re.compile(r'(fc|head|classifier\.1)\.(weight|bias|attention\..+)')
_CLASSIFIER_IN_MMPRETRAIN = 'head.fc.'


def name_in_classifiers(state_dict: dict[str, Tensor], prefix: str = '', *_: Any) -> None:
    """Translates the names of a whole ImageNet network to those of an ``ImageClassifier``.

    The classifier becomes ``head.fc``, everything else goes under ``backbone.``. A dynamic
    classifier (MobileNetV2 1/2x) takes the last warehouse of the file into its head. A state dict
    that has a ``backbone.`` already does not change.

    mmpretrain calls this as the ``_checkpoint_filter`` of a backbone, before it loads a state dict
    into the classifier that has the backbone.

    Args:
        state_dict: Changed in place.
        prefix: The classifier's place in the state dict.
        *_: Other arguments that ``load_state_dict`` passes to a hook; not used.
    """
    names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    if any(name.startswith('backbone.') for name in names):
        return
    dynamic = any(name.startswith('classifier.1.attention.') for name in names)
    last = max(stored_warehouses(state_dict, prefix), default=None) if dynamic else None
    for name in names:
        if match := _CLASSIFIER.fullmatch(name):
            new = f'{_CLASSIFIER_IN_MMPRETRAIN}{match[2]}'
        elif name == f'warehouse_manager.weights.{last}':
            new = 'head.warehouse_manager.weights.0'
        else:
            new = f'backbone.{name}'
        state_dict[f'{prefix}{new}'] = state_dict.pop(f'{prefix}{name}')
