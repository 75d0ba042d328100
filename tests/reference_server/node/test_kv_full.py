"""The KV capacity that the solver gives a node is what its stage can hold: filled to the last token, under a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ModelDir

MEMORY_BYTES = 80e6
KV_BYTES_PER_TOKEN = 4 * 2 * 2 * 16 * 4  # of 4 layers: keys and values of 2 heads of 16 float32


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's RLIMIT_DATA")
def test_planned_kv_is_filled_to_the_last_token_and_one_more_is_refused(model_dir: ModelDir) -> None:
    argv = [
        sys.executable,
        "-m",
        "tests.reference_server.node.kv_filler",
        str(model_dir("test-llama")),
        str(MEMORY_BYTES),
    ]
    done = subprocess.run(argv, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)

    planned = outcome["planned"]
    assert planned * KV_BYTES_PER_TOKEN > 0.7 * MEMORY_BYTES, "most of the memory is for KV cache"
    assert "failed" in outcome["less"], "a limit that nothing meets proves nothing"
    assert outcome["all"]["filled"] == planned
    assert outcome["all"]["is_last_written"]
    assert f"wants 1 KV slots; 0 of {planned} are free" in outcome["all"]["refusal"]
