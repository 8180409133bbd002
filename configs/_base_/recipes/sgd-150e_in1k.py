"""The recipe of MobileNetV2 on ImageNet, but for the network.

Of the KernelWarehouse paper: 150 epochs, temperature over the first 15.
Of mmpretrain's MobileNetV2: SGD, batch 256, momentum 0.9, weight decay 4e-5, random crops and flips.
Ours, as is usual for 150 epochs: rate 0.05 falling as a cosine; no dropout before the classifier.
"""

_base_ = [
    'mmpretrain::_base_/models/mobilenet_v2_1x.py',
    'mmpretrain::_base_/datasets/imagenet_bs32_pil_resize.py',
    'mmpretrain::_base_/schedules/imagenet_bs256_epochstep.py',
    'mmpretrain::_base_/default_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', T_max=150, by_epoch=True, convert_to_iter_based=True
)
train_cfg = dict(max_epochs=150)
