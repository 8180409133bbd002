"""How a network goes on from static weights: ``**_base_.fine_tune`` beside the type of a backbone.

LayerNorm in the attentions does not depend on the other images of a batch. docs/evidence.md has what
it gains with batches of four images. Files of the paper's authors have BatchNorm there.
"""

fine_tune = dict(attention_norm_cfg=dict(type='LN'))
