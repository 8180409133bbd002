"""Goes on from the static network's weights: ``load_from`` its checkpoint."""

_base_ = [
    './fpn_r18-half_mini-conditions-semantic.py',
    '../_base_/recipes/fine-tune.py',
]

model = dict(backbone=dict(type='mmkw.KWResNet', cell_num_ratio=1, **_base_.fine_tune))
