"""Rewrites the authors' checkpoints with the names of the networks here."""

import re
from typing import Any

from torch import Tensor

from ..checkpoints.beyond import beyond_backbone
from ..checkpoints.errors import CheckpointMismatchError, shown
from ..checkpoints.recognising import check_cells, stored_warehouses
from .classifiers import name_in_classifiers
from .convnext import convnext_names
from .mobilenet_v2 import mobilenet_v2_names

# Number of blocks in the groups of a MobileNetV2.
_BLOCKS = [1, 2, 3, 4, 3, 3, 1]
_KNOWN = re.compile(
    r'warehouse_manager\.weights\.\d+'
    r'|(conv1|bn1|stem|layer\d|conv2|downsample_layers\.\d|stages\.\d|norm\d)\..+'
)


def rewrite_published(
    checkpoint: dict[str, Any], library: str = 'mmdet'
) -> tuple[dict[str, Tensor], list[str]]:
    """Translates a published checkpoint of ImageNet or of a detector.

    Args:
        checkpoint: A result of :func:`~mmkw.checkpoints.read_checkpoint`; not changed.
        library: ``mmdet``, ``mmseg`` or ``mmpretrain``: the library that the names are for. For
            mmpretrain the result is a whole classifier. In the others only the names of MobileNetV2
            differ.

    Returns:
        The state dict, and the names of the tensors that are left out on purpose. These are, but
        for mmpretrain, the ImageNet classifier, and MobileNetV2's last convolution if the library
        lacks it.

    Raises:
        CheckpointMismatchError: If the checkpoint has no warehouses, or if it has tensors that no
            backbone here has.
        DamagedCheckpointError: If a warehouse is not a dense tensor of real, finite numbers.
    """
    state = checkpoint.get('state_dict', checkpoint)
    # Models that are wrapped for several devices save names with this prefix.
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    whole = library == 'mmpretrain'
    if whole:
        name_in_classifiers(state)
    prefix = 'backbone.' if any(key.startswith('backbone.') for key in state) else ''
    check_cells(state, prefix)
    warehouses = stored_warehouses(state, prefix)
    if not warehouses:
        raise CheckpointMismatchError(
            f'The checkpoint has no {prefix}warehouse_manager.weights: it is not of '
            f'KernelWarehouse. Its first names are {", ".join(map(shown, list(state)[:3]))}.'
        )
    if any(key.startswith(f'{prefix}features.') for key in state):
        mobilenet_v2_names(_BLOCKS, library != 'mmdet', state, prefix)
    elif any(key.startswith(f'{prefix}stages.') for key in state):
        convnext_names(state, prefix, norm='norm3' if whole else 'norm')
    own = () if library == 'mmseg' else ('conv2',)
    unused = beyond_backbone(state, prefix, max(warehouses), own)
    for key in unused:
        del state[key]
    names = [key[len(prefix) :] for key in state if key.startswith(prefix)]
    unknown = [name for name in names if not _KNOWN.fullmatch(name)]
    if unknown:
        raise CheckpointMismatchError(
            f'No backbone here has {len(unknown)} of the tensors, such as '
            f'{prefix}{shown(unknown[0])}.'
        )
    return state, unused
