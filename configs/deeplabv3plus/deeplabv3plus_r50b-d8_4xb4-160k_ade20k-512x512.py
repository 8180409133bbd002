_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py'

model = dict(pretrained='torchvision://resnet50', backbone=dict(type='ResNet'))
