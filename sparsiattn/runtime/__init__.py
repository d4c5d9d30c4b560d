"""The code inside a patched model's forward: hooks, the SDPA wrapper, and the state of a patch.

It may import `sparsiattn.strategies` and the packages below it. `sparsiattn.patching` installs it;
serialization and the packages above may import it.
"""

from sparsiattn.runtime.attribute_override import AttributeOverride
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.multihead import SparseMultihead
from sparsiattn.runtime.patch_state import (
    PATCH_ATTRIBUTE,
    PatchState,
    live_patches,
    state_of,
    unwrap,
)
from sparsiattn.runtime.site_runtime import PLANNER, SiteRuntime, is_planner_key, notify_planner
from sparsiattn.runtime.thread_state import MODEL_CALL
from sparsiattn.runtime.timing import Timing, paired
