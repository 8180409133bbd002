"""Weights of ImageNet where images differ as a whole: clear, noisy, blurred or dark."""

_base_ = './mask-rcnn_efficientnet-lite0_fpn_mini-stamps.py'

data_root = 'data/mini_conditions/'
dataset = dict(data_root=data_root, metainfo=dict(classes=tuple(f'digit {i}' for i in range(10))))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
