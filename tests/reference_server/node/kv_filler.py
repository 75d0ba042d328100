"""Fill a stage's KV cache to the last token in a process that may take no more memory than its node has.

``python -m tests.reference_server.node.kv_filler MODEL MEMORY_BYTES``; prints one JSON object. First it is tried with
less than the node has, to see that the limit is one.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Sequence

import torch

from helixbench.profiler.cluster import Device, Node
from helixbench.profiler.cost.measured import MeasuredCost
from helixbench.profiler.cost.model import GATHER_UP_TO_TOKENS, StageCost
from helixbench.profiler.measure.grid import peak_points
from helixbench.profiler.measure.memory import LoadedMemory, workspace_bytes
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.stage import Stage, preload
from helixbench.solver.problem.capacity import kv_capacity_tokens
from helixbench.solver.problem.plan import LayerRange

START, END = 1, 5
BATCH_TOKENS, CONTEXT_TOKENS = 64, 128
CPU = torch.device("cpu")


def stage_of(files: ModelFiles, kv_tokens: int) -> Stage:
    return Stage(files, start=START, end=END, kv_capacity_tokens=kv_tokens, dtype=torch.float32, device=CPU)


def run(stage: Stage, chunks: Sequence[tuple[int, int, int]]) -> None:
    """One iteration over (request, past, new tokens)."""
    stage.forward(
        [
            StageItem(
                request=request,
                past=past,
                num_tokens=new,
                entry_layer=START,
                sample=False,
                inputs=torch.ones((new, stage.hidden_size)),
            )
            for request, past, new in chunks
        ]
    )


def measured_workspace(files: ModelFiles) -> float:
    """As a profile measures it: overhead of a stage and the peak of the batches that need most, both on it alone."""
    points = peak_points(
        num_layers=END - START,
        max_batch_tokens=BATCH_TOKENS,
        max_context_tokens=CONTEXT_TOKENS,
        max_kv_tokens=BATCH_TOKENS * CONTEXT_TOKENS,
        gather_up_to_tokens=GATHER_UP_TO_TOKENS["cpu"],
    )
    memory = LoadedMemory(CPU, memory_bytes=1e9)
    stage = stage_of(files, max(point.kv_tokens for point in points))
    use = memory.use_of(stage)

    def run_each() -> None:
        for point in points:
            parts = [*point.prefills, *((past, 1) for past in point.decodes)]
            chunks = [(request, past, new) for request, (past, new) in enumerate(parts)]
            for request, past, new in chunks:
                stage.kv.reserve(request, past + new)
            run(stage, chunks)
            for request, _, _ in chunks:
                stage.kv.release(request)

    return use.overhead_bytes + workspace_bytes(run_each, device=CPU)


def planned_kv_tokens(files: ModelFiles, memory_bytes: float, workspace: float) -> int:
    """As the solver works it out from a profile with that workspace."""
    cost = MeasuredCost(
        stage=StageCost.with_zeros(max_tokens=1.0, max_context_tokens=1.0),
        samples=(),
        held_out_error_median=0.0,
        held_out_error_p90=0.0,
        workspace_bytes=workspace,
        max_batch_tokens=BATCH_TOKENS,
        source="",
    )
    node = Node(
        name="n", device=Device(kind="cpu", name="cpu", memory_bytes=memory_bytes), max_layers=END - START, cost=cost
    )
    return kv_capacity_tokens(files.facts(dtype="float32"), node, LayerRange(START, END))


def data_bytes() -> int:
    """What RLIMIT_DATA counts."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))


def fill(files: ModelFiles, kv_tokens: int) -> dict[str, object]:
    """What became of filling the whole cache, and of one token more."""
    try:
        stage = stage_of(files, kv_tokens)
        request, filled = 0, 0
        while filled < kv_tokens:
            length = min(CONTEXT_TOKENS, kv_tokens - filled)
            stage.kv.reserve(request, length)
            for past in range(0, length, BATCH_TOKENS):
                run(stage, [(request, past, min(BATCH_TOKENS, length - past))])
            request, filled = request + 1, filled + length
        # The last token of as many requests as a batch holds, once more: their contexts are copied together.
        run(stage, [(decoding, CONTEXT_TOKENS - 1, 1) for decoding in range(min(BATCH_TOKENS, request - 1))])
    except (RuntimeError, MemoryError) as error:
        return {"failed": str(error)}
    refusal = ""
    try:
        stage.kv.reserve(request, 1)
    except ValueError as error:
        refusal = str(error)
    is_last_written = bool((stage.kv.arena[:, :, :, kv_tokens - 1].abs().sum(dim=-1) > 0).all())
    return {"filled": stage.kv.used_tokens, "is_last_written": is_last_written, "refusal": refusal}


def in_another_process(measure: Callable[[ModelFiles], float], files: ModelFiles) -> float:
    """What that says in a fork of this one: the heap that it leaves behind would be no part of the limit here."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, str(measure(files)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        value = float(said.read())
    os.waitpid(child, 0)
    return value


def main(model: str, memory_bytes: float) -> dict[str, object]:
    """Plan and fill, with less memory than the node has and with what it has."""
    torch.set_num_threads(1)
    files = ModelFiles(model)
    preload(files.config)
    kv_tokens = planned_kv_tokens(files, memory_bytes, in_another_process(measured_workspace, files))
    before, (_, hard) = data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)
    outcomes = {}
    for name, share in (("less", 0.7), ("all", 1.0)):
        resource.setrlimit(resource.RLIMIT_DATA, (int(before + share * memory_bytes), hard))
        outcomes[name] = fill(files, kv_tokens)
    return {"planned": kv_tokens, **outcomes}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]))))
