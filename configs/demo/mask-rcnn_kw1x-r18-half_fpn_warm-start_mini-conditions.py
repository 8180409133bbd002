"""Goes on from the static network's weights: ``load_from`` its checkpoint."""

_base_ = [
    './mask-rcnn_r18-half_fpn_mini-conditions.py',
    '../_base_/recipes/fine-tune.py',
]

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1, **_base_.fine_tune))
