"""How a short training begins from random weights: ``**_base_.from_scratch`` beside the type of a backbone.

The dynamic network begins with the random kernels of the static one, at temperature 0, and needs no
TemperatureHook; LayerNorm in the attentions does not depend on the other images of a batch.
docs/evidence.md has what it gains over six and twelve epochs. The paper's start is for hundreds.
"""

from_scratch = dict(keep_weights=True, attention_norm_cfg=dict(type='LN'))
