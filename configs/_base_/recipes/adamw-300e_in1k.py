"""The recipe of ResNet and ConvNeXt on ImageNet, but for the network.

Of the KernelWarehouse paper: 300 epochs of AdamW with RandAugment, mixup, CutMix, random erasing and
label smoothing, which is the recipe of ConvNeXt; temperature over the first 20 epochs.
Of ConvNeXt's paper, as mmpretrain has it: batch 4096, rate 0.004, weight decay 0.05 but for norms
and biases, 20 epochs of warm-up, then a cosine.
Ours, where the KernelWarehouse paper is silent: no average of the weights (EMA).

On 8 devices: optim_wrapper.accumulative_counts=4.
"""

_base_ = [
    'mmpretrain::_base_/models/convnext/convnext-tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.004))
auto_scale_lr = dict(base_batch_size=4096)
