"""KernelWarehouse 1x ConvNeXt-Tiny in place of a config's backbone, and its optimizer."""

_base_ = './convnext-tiny.py'

weights_source = _base_.kw1x_source
backbone = _base_.kw1x
