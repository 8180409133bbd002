"""Images that differ as a whole: clear, noisy, blurred or dark."""

_base_ = './mask-rcnn_r18-half_fpn_mini-coco.py'

data_root = 'data/mini_conditions/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
