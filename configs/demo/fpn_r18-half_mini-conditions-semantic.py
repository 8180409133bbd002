"""Images that differ as a whole, and half as wide a ResNet18, with a fourth of the weights."""

_base_ = './fpn_r18_mini-coco-semantic.py'

data_root = 'data/mini_conditions/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
model = dict(backbone=dict(base_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))
