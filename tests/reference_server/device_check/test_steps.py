"""What the steps find on a CPU, where it is right and where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helixbench.errors import MeasurementError
from helixbench.profiler.stage.stage import Stage
from helixbench.reference_server.device_check import steps
from helixbench.reference_server.node import token_sampling
from tests.conftest import ModelDir

CPU = torch.device("cpu")


def test_a_family_is_compared_with_transformers(model_dir: ModelDir) -> None:
    assert steps._compare_family(model_dir("test-gemma3"), CPU) < steps.TOLERANCE_FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stage_that_computes_something_else_is_found(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    real = Stage.head

    def off(stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
        logits = real(stage, hidden)
        return logits + torch.randn_like(logits) if stage.dtype == dtype else logits

    monkeypatch.setattr(Stage, "head", off)
    with pytest.raises(MeasurementError, match=f"test-llama: logits in {str(dtype).removeprefix('torch.')}"):
        steps._compare_family(model_dir("test-llama"), CPU)


def test_tokens_that_the_device_draws_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps.sampling(CPU, tmp_path).figures["rows_s"] > 0
    real, calls = token_sampling.sample, [0]

    def off(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return real(*arguments) + (calls[0] > 1)

    monkeypatch.setattr(token_sampling, "sample", off)
    with pytest.raises(MeasurementError, match="256 of 256 tokens are not those that the CPU draws"):
        steps.sampling(CPU, tmp_path)


def test_layers_of_a_shape_are_timed_and_counted(tmp_path: Path) -> None:
    found = steps.shape(CPU, tmp_path)
    assert found.figures["layer_8x1000_s"] > 0
    assert found.figures["layer_1x128_share_of_copy"] > 0
    assert found.figures["attention_calls"] == 6, "one for each layer, where one sequence decodes"
    assert found.figures["left_out"] == 0
