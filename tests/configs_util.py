"""Makes any config of the project small enough to run on the CPU in a test."""

import copy

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData


def without_weights(cfg):
    """Removes every ``init_cfg``: weights to download or to be put in place by the user."""
    if isinstance(cfg, dict):
        cfg.pop('init_cfg', None)
        for value in cfg.values():
            without_weights(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            without_weights(value)
    return cfg


def build_detector(config: Config):
    """Builds the detector of a config with random weights."""
    from mmdet.registry import MODELS

    init_default_scope(config.get('default_scope', 'mmdet'))
    return MODELS.build(without_weights(copy.deepcopy(config.model)))


def detection_batch(batch=2, size=128, classes=10):
    """Images with two boxes and masks each, as the dataloader would give them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for index in range(batch):
        inputs.append(torch.randint(0, 255, (3, size, size), generator=generator).to(torch.uint8))
        boxes = torch.tensor([[8.0, 8.0, 72.0, 56.0], [40.0, 24.0, 120.0, 120.0]])
        masks = torch.zeros(2, size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                img_shape=(size, size),
                ori_shape=(size, size),
                scale_factor=(1.0, 1.0),
                pad_shape=(size, size),
                batch_input_shape=(size, size),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=boxes,
            labels=torch.randint(0, classes, (2,), generator=generator),
            masks=BitmapMasks(masks.numpy(), size, size),
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
