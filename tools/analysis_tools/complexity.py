"""Counts parameters and FLOPs of configs: ``complexity.py CONFIG... [--shape HEIGHT WIDTH]``."""

import argparse
from typing import NamedTuple

import torch
from mmengine.config import Config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmkw.cli.config import pixels
from mmkw.engine.building import build_model
from mmkw.engine.command_line import config_of, library_of


class Complexity(NamedTuple):
    """Size and cost of a model.

    Args:
        parameters: Of the whole model.
        backbone_parameters: Of its backbone.
        backbone_flops: Multiply-adds of the backbone for one image, attentions and mixing included.
        shape: Height and width of that image.
    """

    parameters: int
    backbone_parameters: int
    backbone_flops: int
    shape: tuple[int, int]


def count(config: Config, shape: tuple[int, int] | None = None) -> Complexity:
    """Builds the model of a config without memory for its tensors, and counts.

    Args:
        config: Of a detector, segmentor or classifier.
        shape: Height and width of the image; by default the crop of a segmentor or classifier, and
            800 x 1280 for a detector.
    """
    height, width = shape or _shape_of(config)
    model = build_model(config, on_meta=True).eval()
    return Complexity(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.backbone.parameters()),
        _flops(model.backbone, str(config.model.backbone), height, width),
        (height, width),
    )


# Many configs have the same backbone, and counting takes longer than building.
_counted: dict[tuple[str, int, int], int] = {}


def _flops(backbone: nn.Module, config: str, height: int, width: int) -> int:
    """Multiply-adds for one image, of a backbone that is known by its config."""
    if (config, height, width) not in _counted:
        image = torch.empty(1, 3, height, width, device='meta')
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(image)
        # The counter counts a multiply-add as two.
        _counted[config, height, width] = counter.get_total_flops() // 2
    return _counted[config, height, width]


def _shape_of(config: Config) -> tuple[int, int]:
    if library_of(config) == 'mmpretrain':
        pipeline = config.test_dataloader.dataset.pipeline
        (side,) = [step.crop_size for step in pipeline if step.type == 'CenterCrop']
        return side, side
    return config.model.data_preprocessor.get('size') or (800, 1280)


def main() -> None:
    """Reads the command line and prints one line a config."""
    parser = argparse.ArgumentParser(description='Count parameters and FLOPs')
    parser.add_argument('configs', nargs='+', help='config files, or PACKAGE::CONFIG')
    parser.add_argument('--shape', nargs=2, type=pixels, help='height and width of the image')
    args = parser.parse_args()
    for path in args.configs:
        config = config_of(parser, path)
        total, backbone, flops, (height, width) = count(config, args.shape)
        print(
            f'{path}: {total:,} parameters; backbone {backbone:,} parameters, '
            f'{flops / 1e9:.2f} GFLOPs at {height} x {width}'
        )


if __name__ == '__main__':
    main()
