"""The recipe of ResNet and ConvNeXt on ImageNet, but for the network.

Of the KernelWarehouse paper: 300 epochs of AdamW with RandAugment, mixup, CutMix, random erasing and
label smoothing, which is the recipe of ConvNeXt; temperature over the first 20 epochs.
Of ConvNeXt's paper, as mmpretrain has it: batch 4096, rate 0.004, weight decay 0.05 but for norms
and biases, 20 epochs of warm-up, then a cosine.
Ours, where the KernelWarehouse paper is silent: no average of the weights (EMA).

On 8 devices: optim_wrapper.accumulative_counts=4.
"""

_base_ = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'

custom_hooks = []
