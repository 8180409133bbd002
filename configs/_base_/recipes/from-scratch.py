"""How a short training begins from random weights: ``**_base_.from_scratch`` beside a backbone's type.

The dynamic network begins with the random kernels of the static one, at temperature 0, and needs no
TemperatureHook; LayerNorm in the attentions does not depend on the other images of a batch. In
docs/evidence.md this is "one to one, LN"; the paper's start is for hundreds of epochs.

MMDetection's configs are for weights of ImageNet: without them a ResNet wants ``init_cfg=None``,
``frozen_stages=-1`` and ``norm_eval=False``, too, static or dynamic.
"""

from_scratch = dict(keep_weights=True, attention_norm_cfg=dict(type='LN'))
