"""What a backbone in fewer bits costs in accuracy: ``precision.py CONFIG CHECKPOINT``.

Tests a trained model on the config's test set with its backbone in float32, under autocast to
bfloat16, of bfloat16, and with cells stored as integers. The rest of the model stays in float32.

Example:
    python tools/deployment/precision.py
    configs/demo/mask-rcnn_kw1x-r18-half_fpn_warm-start_mini-conditions.py
    work_dirs/demo/epoch_2.pth
"""

import copy
from collections.abc import Sequence

import torch
from mmengine.runner import Runner
from testing import evaluate, model_parser, trained
from torch import Tensor, nn

from mmkw import is_converted, quantize_cells

PRECISIONS = ('float32', 'autocast', 'bfloat16', 'int8')


class InPrecision(nn.Module):
    """A backbone that computes in a precision, between images and features of float32.

    Args:
        backbone: In float32; it is changed in place. A static one has no cells.
        precision: One of ``PRECISIONS``.
    """

    def __init__(self, backbone: nn.Module, precision: str) -> None:
        super().__init__()
        self.half, self.autocast = precision == 'bfloat16', precision == 'autocast'
        if precision == 'int8' and is_converted(backbone):
            quantize_cells(backbone)
        self.backbone = backbone.bfloat16() if self.half else backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """The features of images."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            features = self.backbone(images.bfloat16() if self.half else images)
        return [feature.float() for feature in features]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, tests in every precision, and prints a table."""
    parser = model_parser('Accuracy of backbones in fewer bits', 'work_dirs/precision')
    config, model = trained(parser, parser.parse_args(argv))
    runner = Runner.from_cfg(config)
    metrics = {}
    for precision in PRECISIONS:
        copied = copy.deepcopy(model)
        copied.backbone = InPrecision(copied.backbone, precision)
        metrics[precision] = evaluate(runner, copied)
    names = list(metrics['float32'])
    print(f'| backbone | {" | ".join(names)} |\n{"|---" * (len(names) + 1)}|')
    for precision, found in metrics.items():
        print(f'| {precision} | {" | ".join(f"{found[name]:.4f}" for name in names)} |')


if __name__ == '__main__':
    main()
