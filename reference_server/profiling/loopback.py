"""The ring on which an agent measures itself: a batch that it sends to itself comes back for the next iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cost.measured import LayerTimes
from helixbench.profiler.measure.grid import GridPoint, Iterate
from helixbench.profiler.measure.layer_times import Batch, measure_layer_times
from helixbench.profiler.measure.memory import out_of_memory_is, workspace_bytes
from helixbench.profiler.model.files import ModelFiles
from helixbench.profiler.stage.stage import Stage
from helixbench.reference_server.node.token_sampling import Draw, sample
from helixbench.reference_server.node.torch_runner import tensor_bytes, torch_stage
from helixbench.reference_server.profiling.config import RING, SELF
from helixbench.reference_server.wire.messages import Work
from helixbench.solver.problem.plan import Hop
from helixbench.solver.scheduling.work import OpenRequest, SamplingParams, WorkItem

if TYPE_CHECKING:
    from helixbench.reference_server.node.agent import Agent

_TURN_TIMEOUT_MS = 60_000


class Ring:
    """Runs a batch again and again by sending it round; embedding and head run alone."""

    def __init__(self, agent: Agent, files: ModelFiles, *, end: int) -> None:
        self._agent = agent
        self._end = end
        self._next_request = 0
        stage = self._stage = torch_stage(agent.runtime)
        last = files.num_layers - 1
        with out_of_memory_is(InputError, "the model's first and last layer, to measure embedding and head"):
            self._first, self._last = (
                Stage(files, start=start, end=start + 1, kv_capacity_tokens=1, dtype=stage.dtype, device=stage.device)
                for start in (0, last)
            )

    @contextmanager
    def run(self, point: GridPoint) -> Iterator[Iterate]:
        """The function that runs one iteration of the batch."""
        stage = self._stage
        generator = torch.Generator().manual_seed(point.num_tokens)
        hidden = torch.randn((point.num_tokens, stage.hidden_size), generator=generator).to(stage.dtype)
        if point.part == "embedding":
            ids = torch.randint(stage.vocab_size, (point.num_tokens,), generator=generator)
            yield lambda: self._embed(ids)
        elif point.part == "head":
            on_device = hidden.to(stage.device)
            yield lambda: self._sample(on_device)
        else:
            requests = self._open(point)
            self._agent.send_to_peer(RING, self._work(point, requests), tensor_bytes(hidden))
            yield self._turn
            # Not after an error: what failed has been taken in and comes back no more, and the stage is dropped.
            self._agent.discard_message(_TURN_TIMEOUT_MS)
            self._agent.runtime.accept(Work(closes=tuple(requests)), None)

    def workspace_bytes(self, points: Sequence[GridPoint]) -> float:
        """Peak memory of these batches beside weights and KV cache, messages included.

        They must be the first of all: later ones find memory that the process kept.
        """

        def run_each() -> None:
            for point in points:
                with self.run(point) as iterate:
                    iterate()

        return workspace_bytes(run_each, device=self._stage.device)

    def layer_times(self, files: ModelFiles, wanted: Sequence[Batch], *, deadline: Callable[[], bool]) -> LayerTimes:
        """Where the time of the stage goes; see ``measure_layer_times``."""

        def choose(logits: torch.Tensor) -> list[int]:
            drawn: list[int] = sample(logits, [Draw(SamplingParams(temperature=1.0))] * len(logits)).tolist()
            return drawn

        with out_of_memory_is(MeasurementError, "timing single layers"):
            return measure_layer_times(
                self._stage, self._first, self._last, files, wanted, choose=choose, deadline=deadline
            )

    def _embed(self, ids: torch.Tensor) -> None:
        with out_of_memory_is(MeasurementError, "the embedding"):
            hidden = self._first.embed(ids)
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)  # it stays there: the first layer follows

    def _sample(self, hidden: torch.Tensor) -> None:
        with out_of_memory_is(MeasurementError, "the head"):
            tokens = self._last.head(hidden).argmax(dim=-1)
        tokens.cpu()  # they are sent on, so they are copied

    def _turn(self) -> None:
        if not self._agent.turn(_TURN_TIMEOUT_MS):
            raise MeasurementError("the profiled batch did not come back over the node's own socket")

    def _open(self, point: GridPoint) -> list[int]:
        sizes = [past + new for past, new in point.prefills] + [past + 1 for past in point.decodes]
        requests = list(range(self._next_request, self._next_request + len(sizes)))
        self._next_request += len(sizes)
        hops = (Hop(SELF, self._end - point.num_layers, self._end), Hop(RING, self._end, self._end + 1))
        opens = tuple(
            OpenRequest(request, hops, size, SamplingParams()) for request, size in zip(requests, sizes, strict=True)
        )
        self._agent.runtime.accept(Work(opens=opens), None)
        return requests

    def _work(self, point: GridPoint, requests: list[int]) -> Work:
        parts = [(past, new, False) for past, new in point.prefills] + [(past, 1, True) for past in point.decodes]
        items = tuple(
            WorkItem(request, past, new, sample=True, is_decode=is_decode)
            for request, (past, new, is_decode) in zip(requests, parts, strict=True)
        )
        return Work(items=items, dtype=self._agent.runtime.runner.hidden_dtype)
