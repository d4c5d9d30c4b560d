"""Hand-written attention, ``softmax(q @ k.mT * s + b) @ v``, led to scaled dot product attention.

No forward is copied. While a lifted module runs, the product of its queries and keys is put off:
the host gets `Scores`, which take down what it does to them (factors, biases, masks, views,
softmax, dropout). Once they meet the values, scaled dot product attention is called with what was
taken down. If the host does anything else to them they are computed after all, and it goes on as
if nothing had happened.
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
