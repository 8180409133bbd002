_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb4-40k_coco-stuff10k-512x512.py'

model = dict(pretrained='torchvision://resnet50', backbone=dict(type='ResNet'))
