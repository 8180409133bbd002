"""Sharing plans, the rules and patterns that make plans, and the conversion of networks."""

from .convert import convert, static_networks, to_static
from .families import family_rule, split_groups
from .loading import is_converted
from .patterns import pattern_plan
from .plan import SharingPlan
from .rules import convnext_rule, mobilenet_v2_rule, resnet_rule

__all__ = [
    'SharingPlan',
    'convert',
    'convnext_rule',
    'family_rule',
    'is_converted',
    'mobilenet_v2_rule',
    'pattern_plan',
    'resnet_rule',
    'split_groups',
    'static_networks',
    'to_static',
]
