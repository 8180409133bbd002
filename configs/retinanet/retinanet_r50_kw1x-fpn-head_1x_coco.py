"""A dynamic neck and head on a static ResNet50.

``load_from`` a static RetinaNet starts it there.
"""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

towers = [dict(match=r'(cls|reg)_convs\.\d\.conv', warehouse=r'\1')]
model = dict(
    neck=dict(type='mmkw.KWModule', module=dict(type='FPN')),
    bbox_head=dict(type='mmkw.KWModule', module=dict(type='RetinaHead'), patterns=towers),
)
