"""Across processes: the backend is found without an import, a second process runs no pass, and a
changed option compiles anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))
options = json.loads(sys.argv[1])
compiled = torch.compile(model, backend="hadagraph", options=options or None)
loss = compiled(torch.randn(64, 32)).square().mean()
loss.backward()
import hadagraph
print(json.dumps({
    "passes": len(hadagraph.report()),
    "aot_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "fx_hits": counters["inductor"]["fxgraph_cache_hit"],
    "loss": loss.item(),
    "gradient": model[0].weight.grad.square().sum().item(),
}))
"""


def run(cache: str, options: dict[str, object]) -> dict[str, float]:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_runs_no_pass_and_a_changed_option_compiles_anew(tmp_path):
    cache = str(tmp_path)
    first = run(cache, {})
    second = run(cache, {})
    assert first["passes"] == 1 and second["passes"] == 0
    assert second["aot_hits"] == 1
    assert (first["loss"], first["gradient"]) == (second["loss"], second["gradient"])

    changed = run(cache, {"recipe": "fp8_rowwise"})
    assert changed["passes"] == 1 and changed["aot_hits"] == 0
    assert changed["gradient"] != first["gradient"]
    # A dump must show the passes at work, whatever is cached.
    assert run(cache, {"dump": str(tmp_path / "dump")})["passes"] == 1
    assert list((tmp_path / "dump" / "graph_00").glob("*_lower_precision.diff"))
