"""Saving, loading, the Hugging Face Hub, creation of models by name, and export.

It may import `sparsiattn.runtime` and the packages below it. This package reads and writes files;
`sparsiattn.patching`, which imports it, applies a loaded patch to a model.
"""

from sparsiattn.serialization.creating import create_model, is_saved
from sparsiattn.serialization.exporters import ExportResult, export
from sparsiattn.serialization.files import Saved, with_checksum
from sparsiattn.serialization.origin import origin_of
from sparsiattn.serialization.save import planner_tensors
