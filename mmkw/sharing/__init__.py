"""Sharing plans, the paper's rules for them, and the conversion of static networks."""

from .convert import convert
from .plan import SharingPlan
from .rules import convnext_rule, mobilenet_v2_rule, resnet_rule

__all__ = ['SharingPlan', 'convert', 'convnext_rule', 'mobilenet_v2_rule', 'resnet_rule']
