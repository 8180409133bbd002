"""Plans from patterns: the first match wins, the rest is static, mistakes are named."""

import pytest
from mmcv.ops import DeformConv2d
from torch import nn

from mmkw.layers import PlanError
from mmkw.sharing import pattern_plan


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer3 = nn.ModuleList(self.block() for _ in range(2))
        self.layer4 = nn.ModuleList(self.block() for _ in range(2))
        self.attention = nn.MultiheadAttention(16, 2)
        self.deform = DeformConv2d(16, 16, 3)
        self.up = nn.ConvTranspose2d(16, 16, 2)

    @staticmethod
    def block():
        return nn.ModuleDict(
            dict(conv1=nn.Conv2d(16, 16, 1), conv2=nn.Conv2d(16, 16, 3), bn=nn.BatchNorm2d(16))
        )


def test_first_match_wins_and_the_rest_is_static():
    plan = pattern_plan(
        Network(),
        [
            dict(match=r'layer3\.1\.conv2', warehouse='special', cell_num_ratio=4),
            dict(match=r'layer(\d)\.\d+\.conv2', warehouse=r'stage\1_3x3', cell_num_ratio=2),
            dict(match=r'attention\.value', reduction=0.5),
        ],
        reduction=0.25,
    )
    assert plan.layers == (
        ('layer3.0.conv2', 'stage3_3x3'),
        ('layer3.1.conv2', 'special'),
        ('layer4.0.conv2', 'stage4_3x3'),
        ('layer4.1.conv2', 'stage4_3x3'),
        ('attention.value', r'attention\.value'),
    )
    assert plan.options['special'].cell_num_ratio == 4
    assert plan.options['stage4_3x3'].cell_num_ratio == 2
    assert plan.options['stage4_3x3'].reduction == 0.25
    assert plan.options[r'attention\.value'].reduction == 0.5


@pytest.mark.parametrize(
    'patterns, message',
    [
        ([dict(match=r'layer5\..*')], r"match='layer5.*' decides nothing: no layer matches.*whole"),
        ([dict(match='conv2')], r"match='conv2' decides nothing: no layer matches"),
        (
            [dict(match=r'layer3.*'), dict(match=r'layer3\.0\.conv1')],
            r'earlier patterns have taken layer3.0.conv1',
        ),
        (
            [dict(match='up')],
            r"match='up' catches up, a ConvTranspose2d, which has no dynamic twin",
        ),
        ([dict(match='de.*')], r'catches deform, a DeformConv2d, .*narrow the pattern'),
        ([dict(warehouse='a')], r'patterns\[0\] must be a dict\(match='),
        (['layer3'], r"patterns\[0\] must be a dict\(match=.*, got 'layer3'"),
        (
            [dict(match='layer3', budget=2)],
            r"patterns\[0\] has the unknown \['budget'\]; known are",
        ),
        ([dict(match='(')], r"patterns\[0\]: match='\(': missing \)"),
        ([dict(match='layer3.*', cell_num_ratio=-1)], r'cell_num_ratio must be a number above 0'),
        ([dict(match=3)], r'patterns\[0\]: match must be text, got 3'),
        ([dict(match=None)], r'patterns\[0\]: match must be text, got None'),
        ([dict(match='layer3.*', warehouse=4)], r'patterns\[0\]: warehouse must be text, got 4'),
        ([dict(match='layer3.*', warehouse=None)], 'warehouse must be text, got None'),
        (
            [dict(match='layer3.*', warehouse=r'stage\1')],
            r"warehouse='stage.*1' does not fit match='layer3.*': invalid group reference 1.*has 0",
        ),
        (
            [dict(match='layer3.*', warehouse=r'\g<stage>')],
            r"does not fit match='layer3.*': unknown group name 'stage'",
        ),
        ([], 'The plan names no layer'),
        (
            [
                dict(match='layer3.*', warehouse='w', cell_num_ratio=2),
                dict(match='layer4.*', warehouse='w'),
            ],
            r"match='layer4.*' gives warehouse 'w' other options than an earlier pattern",
        ),
    ],
)
def test_mistakes_are_named(patterns, message):
    with pytest.raises(PlanError, match=message):
        pattern_plan(Network(), patterns)
