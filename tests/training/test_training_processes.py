"""Several processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsiattn.training import train
from tests.support import environment
from tests.support.training_help import losses, patched, two_stages

CODE = """
import sys
import torch
from tests.support.pictures import Pictures
from tests.support.training_help import patched, two_stages
from sparsiattn.training import train
from sparsiattn.training.processes import leave
model = patched()
train(model, Pictures(16), recipe=two_stages(batch_size=8), out=sys.argv[1], eval_data=Pictures(6))
leave()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.support.pictures import Pictures

    script = tmp_path / "run.py"
    script.write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = patched()
    one = train(model, Pictures(16), recipe=two_stages(batch_size=8), eval_data=Pictures(6))
    two = train(
        patched(), Pictures(16), recipe=two_stages(batch_size=8), eval_data=Pictures(6),
        out=tmp_path / "two", resume=True,
    )  # fmt: skip
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    weights = load_file(tmp_path / "two" / "last" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-3)
