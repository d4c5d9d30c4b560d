"""Patched models on disk and on the hub: folders, how a model was made, exported programs.

May import `sparsiattn.runtime` and what stands below it. It writes and reads; putting a patch that
was read on a model is `sparsiattn.patching`'s, which with all above may import this package.
"""

from sparsiattn.serialization.creating import create_model, is_saved
from sparsiattn.serialization.exporters import ExportResult, export
from sparsiattn.serialization.files import Saved, with_checksum
from sparsiattn.serialization.origin import origin_of
from sparsiattn.serialization.save import planner_tensors
