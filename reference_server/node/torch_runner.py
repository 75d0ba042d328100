"""Runner of a stage of a Hugging Face model: tensors in payloads, tokens sampled from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helixbench.errors import MeasurementError
from helixbench.profiler.measure.memory import out_of_memory_is, release_cached
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.kv_cache import KvCache
from helixbench.profiler.stage.stage import Stage, StageOutput
from helixbench.reference_server.node.runner import TOKEN_DTYPE, Payload, require_payload
from helixbench.reference_server.node.runtime import NodeRuntime
from helixbench.reference_server.node.token_sampling import Draw, sample, score
from helixbench.reference_server.wire.messages import Sampled
from helixbench.solver.scheduling.work import OpenRequest, Scores, TokenScore

SCORED_ROWS = 16  # rows of logits at a time: the memory of more was not measured


class TorchRunner:
    """See ``StageRunner``."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.start, self.end, self.is_last = stage.start, stage.end, stage.is_last
        self.hidden_dtype = str(stage.dtype).removeprefix("torch.")
        self._opened: dict[int, OpenRequest] = {}  # request that is sampled for here -> how
        self._prompt_scores: dict[int, list[TokenScore]] = {}  # request that wants them -> those of its prompt so far

    @property
    def weight_bytes(self) -> int:
        """Weights of the stage."""
        return self.stage.weight_bytes

    @property
    def kv(self) -> KvCache:
        """KV slots, and who owns them."""
        return self.stage.kv

    def read(self, payload: Payload | None, *, num_tokens: int, dtype: str) -> torch.Tensor:
        """Token ids [T] or hidden states [T, E]."""
        is_ids = dtype == TOKEN_DTYPE
        needed = torch.int32 if is_ids else self.stage.dtype
        shape = (num_tokens,) if is_ids else (num_tokens, self.stage.hidden_size)
        size = needed.itemsize * int(np.prod(shape))
        name = str(needed).removeprefix("torch.")
        raw = torch.empty(size, dtype=torch.uint8)
        raw.numpy()[:] = np.frombuffer(
            require_payload(payload, size=size, needed=name, num_tokens=num_tokens, got=dtype), dtype=np.uint8
        )
        inputs = raw.view(needed).view(shape)
        if is_ids and not 0 <= int(inputs.min()) <= int(inputs.max()) < self.stage.vocab_size:
            raise MeasurementError(f"a token id is not in [0,{self.stage.vocab_size})")
        return inputs

    def open(self, opened: OpenRequest) -> None:
        """Reserve slots, by packing the cache where need be, and remember how to sample."""
        with out_of_memory_is(MeasurementError, f"packing the KV cache for request {opened.request}"):
            self.kv.reserve(opened.request, opened.kv_tokens)
        self._sample_as(opened)

    def adopt(self, opened: OpenRequest) -> None:
        """Take over slots, and sample as the new attempt says."""
        assert opened.adopts is not None, "nothing to adopt"
        self.kv.rename(opened.adopts, opened.request)
        self._opened.pop(opened.adopts, None)
        self._prompt_scores.pop(opened.adopts, None)
        self._sample_as(opened)

    def _sample_as(self, opened: OpenRequest) -> None:
        if self.is_last:
            self._opened[opened.request] = opened
            if opened.scored:
                self._prompt_scores[opened.request] = []

    def close(self, request: int) -> None:
        """Free the slots and forget."""
        self.kv.release(request)
        self._opened.pop(request, None)
        self._prompt_scores.pop(request, None)

    def drop(self) -> None:
        """Give the device's memory back."""
        device = self.stage.device
        del self.stage
        release_cached(device)

    def forward(self, items: Sequence[StageItem]) -> StageOutput:
        """Run one iteration."""
        with out_of_memory_is(MeasurementError, f"an iteration of {sum(item.num_tokens for item in items)} tokens"):
            return self.stage.forward(items)

    def sample(self, output: StageOutput) -> tuple[Sampled, tuple[int, ...]]:
        """Tokens of the items that sample, and scores where they are wanted.

        The largest logit says whether all are finite: NaN and infinity are larger than any number. Minus infinity is a
        token that cannot be, and not finite where it is the largest.
        """
        assert output.logits is not None, "not the last stage"
        self._score_prompts(output)
        sampling_items = [item for item in output.items if item.sample]
        chosen = sample(output.logits, [self._draw(item) for item in sampling_items])
        is_finite = output.logits.amax(dim=-1).isfinite()
        found = torch.stack([chosen, is_finite.long()]).tolist()  # the one copy from the device
        tokens, scores, failed = [], [], []
        for row, (item, token, is_sound) in enumerate(zip(sampling_items, *found, strict=True)):
            if not is_sound:
                failed.append(item.request)
                continue
            tokens.append((item.request, token))
            num_logprobs = self._opened[item.request].sampling.num_logprobs
            if num_logprobs is not None:
                (own,) = score(output.logits[row : row + 1], [token], num_logprobs)
                scores.append(Scores(item.request, own, tuple(self._prompt_scores.pop(item.request, ()))))
        return Sampled(tuple(tokens), tuple(scores)), tuple(failed)

    def _draw(self, item: StageItem) -> Draw:
        opened, position = self._opened[item.request], item.past + item.num_tokens
        seed = opened.request if opened.sampling.seed is None else opened.sampling.seed
        barred = opened.stop_token_ids if position < opened.stop_from else ()
        return Draw(opened.sampling, seed, position, tuple(barred))

    def _score_prompts(self, output: StageOutput) -> None:
        """Score the prompt tokens that follow those just run, where wanted; a few rows of logits at a time."""
        end = 0
        for item in output.items if self._prompt_scores else ():
            end += item.num_tokens
            if item.request not in self._prompt_scores:
                continue
            opened = self._opened[item.request]
            following = opened.scored[item.past + 1 : item.past + 1 + item.num_tokens]
            rows = output.hidden[end - item.num_tokens :]
            for start in range(0, len(following), SCORED_ROWS):
                tokens = following[start : start + SCORED_ROWS]
                logits = self.stage.head(rows[start : start + len(tokens)])
                self._prompt_scores[item.request] += score(logits, tokens, opened.sampling.num_logprobs or 0)

    def write(self, output: StageOutput, rows: Sequence[slice]) -> memoryview:
        """Raw bytes of the hidden states, row-major, on the host."""
        parts = [output.hidden[part] for part in rows]
        return tensor_bytes(parts[0] if len(parts) == 1 else torch.cat(parts))


def torch_stage(runtime: NodeRuntime) -> Stage:
    """The stage of a Hugging Face model that a node has loaded."""
    runner = runtime.runner
    assert isinstance(runner, TorchRunner), "a stage without torch"
    return runner.stage


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's raw bytes, row-major, on the host."""
    raw: Any = tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
    return memoryview(raw)
