"""Check of a run's outputs against the reference of its model, for models that have one."""

from __future__ import annotations

from helixbench.profiler.model.hash_model import HashModel
from helixbench.profiler.model.hash_reference import first_differences
from helixbench.reference_server.coordinator.bench import BenchResult
from helixbench.reference_server.run_log import DifferingOutput, OutputCheck


def check_outputs(model: HashModel, result: BenchResult) -> OutputCheck:
    """Compare the output of every finished request with what the model gives."""
    pairs = zip(result.requests, result.outputs, strict=True)
    pipelines = {output.request: record.pipeline for record, output in pairs}
    found = first_differences(result.outputs, num_layers=model.num_layers, vocab_size=model.vocab_size)
    return OutputCheck(
        num_checked=len(result.outputs),
        differing=tuple(
            DifferingOutput(request=request, first_token=index, pipeline=pipelines[request])
            for request, index in sorted(found.items())
        ),
    )
