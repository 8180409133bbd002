"""Semantic maps of digits in photographs, made by tools/dataset_converters/make_mini_coco.py."""

classes = ('background', *(f'digit {i}' for i in range(10)))
# A colour a class: black, then hues around the circle.
palette = [
    [0, 0, 0],
    [230, 25, 75],
    [245, 130, 48],
    [255, 225, 25],
    [191, 239, 69],
    [60, 180, 75],
    [66, 212, 244],
    [67, 99, 216],
    [145, 30, 180],
    [240, 50, 230],
    [169, 169, 169],
]
dataset = dict(
    type='BaseSegDataset',
    data_root='data/mini_coco/',
    metainfo=dict(classes=classes, palette=palette),
    img_suffix='.png',
    seg_map_suffix='.png',
    reduce_zero_label=False,
)
# Photographs of 96 to 128 pixels a side, shown at their own size.
crop_size = (128, 128)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='train', seg_map_path='semantic/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='val', seg_map_path='semantic/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
