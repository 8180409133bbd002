"""Only the 3x3 convolutions of the last two stages are dynamic, with budgets of 4 and 2.

Starts from the static ResNet50 of the base config.
"""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

patterns = [
    dict(match=r'layer3\.\d+\.conv2', warehouse='stage3_3x3', cell_num_ratio=4),
    dict(match=r'layer4\.\d+\.conv2', warehouse='stage4_3x3', cell_num_ratio=2),
]
backbone = dict(type='mmkw.KWModule', module=dict(type='ResNet'), patterns=patterns)
model = dict(backbone=backbone)
