"""Turn hand-written attention, ``softmax(q @ k.mT * s + b) @ v``, into calls of SDPA.

No forward is copied. While a lifted module runs, the product of its queries and keys is deferred:
the host gets `Scores`, which record the operations applied to them (factors, biases, masks, views,
softmax, dropout). When they are multiplied with the values, scaled dot product attention is called
with the recorded arguments. Any other operation computes the scores, and the host continues with
an ordinary tensor.
"""

from sparsiattn.runtime.lifting.mode import Lift, Tally
from sparsiattn.runtime.lifting.modules import drop, lift, show_weights, without_scores
from sparsiattn.runtime.lifting.sums import put_off_sums_of
from sparsiattn.runtime.lifting.trial import Trial

__all__ = [
    "Lift",
    "Tally",
    "Trial",
    "drop",
    "lift",
    "put_off_sums_of",
    "show_weights",
    "without_scores",
]
