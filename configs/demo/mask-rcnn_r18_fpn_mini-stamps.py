"""Harder than digits: animals, plants and things, of which the validation shows others."""

_base_ = './mask-rcnn_r18_fpn_mini-coco.py'

data_root = 'data/mini_stamps/'
classes = (
    'mammal',
    'bird',
    'insect',
    'fruit',
    'vegetable',
    'flower',
    'house',
    'money',
    'road sign',
    'vehicle',
)
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = dict(dataset=dataset)
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
