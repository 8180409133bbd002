"""Makes any config of the project small enough to run on the CPU in a test."""

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import InstanceData, PixelData

from mmkw.engine import building

SIZE = 64


def made_small(cfg):
    """Lowers numbers of proposals, queries and units, and crops, so that a step takes seconds."""
    if isinstance(cfg, dict):
        if cfg.get('type') == 'RandomSampler':
            cfg.num = min(cfg.num, 16)
        if 'nms_pre' in cfg and 'max_per_img' in cfg:
            cfg.max_per_img = 16
        if 'num_queries' in cfg:
            cfg.num_queries = 16
        if 'fc_out_channels' in cfg:
            cfg.fc_out_channels = 16
        if cfg.get('type') == 'SegDataPreProcessor':
            cfg.size = (SIZE, SIZE)
        if cfg.get('mode') == 'slide':
            cfg.crop_size, cfg.stride = (SIZE, SIZE), (SIZE // 2, SIZE // 2)
        for value in cfg.values():
            made_small(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            made_small(value)
    return cfg


def build_model(config: Config):
    """Builds the detector or segmentor of a config with random weights, for one process."""
    model = building.build_model(config)
    model.init_weights()
    return revert_sync_batchnorm(model)


def detection_batch(batch=2, size=SIZE, classes=10, masks=True, stuff=False):
    """Images with two boxes (masks, a semantic map) each, as the dataloader would give them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for index in range(batch):
        inputs.append(torch.randint(0, 255, (3, size, size), generator=generator).to(torch.uint8))
        boxes = torch.tensor([[4.0, 4.0, 36.0, 28.0], [20.0, 12.0, 60.0, 60.0]])
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
            bboxes=boxes, labels=torch.randint(0, classes, (2,), generator=generator)
        )
        if masks:
            bitmaps = torch.zeros(2, size, size, dtype=torch.uint8)
            for bitmap, (x1, y1, x2, y2) in zip(bitmaps, boxes.int().tolist()):
                bitmap[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(bitmaps.numpy(), size, size)
        if stuff:
            semantic = torch.randint(0, 53, (1, size, size), generator=generator)
            sample.gt_sem_seg = PixelData(sem_seg=semantic)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def segmentation_batch(batch=2, size=SIZE, classes=2):
    """Images with a semantic map each, as the dataloader would give them."""
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(batch):
        inputs.append(torch.randint(0, 255, (3, size, size), generator=generator).to(torch.uint8))
        shape = dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size))
        sample = SegDataSample(metainfo=shape)
        blocks = torch.randint(0, classes, (1, 4, 4), generator=generator)
        semantic = blocks.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
        sample.gt_sem_seg = PixelData(data=semantic)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
