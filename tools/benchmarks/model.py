"""Times whole detectors and segmentors of any configs; the first config is the reference.

``model.py STATIC_CONFIG CONFIG... --shapes 2x800x1216 --mode train``
"""

import copy
from functools import partial
from pathlib import Path

import torch
from harness import Case, compare, make_cases, parse_shape, parser
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from torch import nn

from mmkw.engine.building import build_model
from mmkw.engine.command_line import config_of


def build(config: Config) -> nn.Module:
    """Builds a model with the random weights it trains from."""
    return revert_sync_batchnorm(build_model(config))


def make_batch(config: Config, model: nn.Module, shape: tuple[int, int, int]) -> dict:
    """Images of noise with things in them, as the dataloader would give them."""
    batch, height, width = shape
    if config.default_scope == 'mmdet':
        from mmdet.models.roi_heads.bbox_heads import BBoxHead
        from mmdet.testing import demo_mm_inputs

        # A cascade has several heads, of the same classes.
        heads = [m for m in model.modules() if isinstance(m, BBoxHead)] or [model.bbox_head]
        return demo_mm_inputs(
            batch,
            [(3, height, width)] * batch,
            num_items=[8] * batch,
            num_classes=heads[0].num_classes,
            with_mask=model.with_mask,
            with_semantic=hasattr(model, 'semantic_head'),
        )
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(batch):
        shapes = dict(img_shape=(height, width), ori_shape=(height, width))
        sample = SegDataSample(metainfo=dict(shapes, pad_shape=(height, width)))
        labels = torch.randint(model.decode_head.num_classes, (1, height // 8 + 1, width // 8 + 1))
        labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        sample.gt_sem_seg = PixelData(data=labels[:, :height, :width].contiguous())
        samples.append(sample)
    images = torch.randint(0, 255, (batch, 3, height, width)).to(torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


def main() -> None:
    """Reads the command line, measures and reports."""
    options = parser(__doc__)
    options.add_argument(
        'configs', nargs='+', help='config files or PACKAGE::CONFIG, the reference first'
    )
    args = options.parse_args()
    configs = {Path(path).stem: config_of(options, path) for path in args.configs}
    reference = next(iter(configs.values()))

    def cases_of(shape: str, only: str | None) -> list[Case]:
        torch.manual_seed(0)
        batches = {}

        def run(model: nn.Module) -> object:
            if not batches:
                batches['data'] = make_batch(reference, model, parse_shape(shape))
            data = model.data_preprocessor(copy.deepcopy(batches['data']), model.training)
            if model.training:
                return model.parse_losses(model(**data, mode='loss'))[0]
            return model(**data, mode='predict')

        variants = {name: partial(build, config) for name, config in configs.items()}
        return make_cases(args, variants, run, only)

    compare(next(iter(configs)), args, cases_of)


if __name__ == '__main__':
    main()
