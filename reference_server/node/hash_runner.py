"""Runner of a hash stage: words in payloads, padded to the size of the published model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helixbench.errors import MeasurementError
from helixbench.profiler.model.hash_model import WORD_BYTES, HashModel
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.hash_stage import HashOutput, HashStage
from helixbench.profiler.stage.kv_slots import KvSlots
from helixbench.reference_server.node.runner import TOKEN_DTYPE, Payload, require_payload
from helixbench.reference_server.wire.messages import Sampled
from helixbench.solver.scheduling.work import OpenRequest


class HashRunner:
    """See ``StageRunner``."""

    hidden_dtype = "uint64"

    def __init__(self, model: HashModel, *, start: int, end: int, kv_capacity_tokens: int, dtype: str) -> None:
        self._stage = HashStage(model, start=start, end=end, kv_capacity_tokens=kv_capacity_tokens, dtype=dtype)
        self._state_words = model.state_bytes(dtype=dtype) // WORD_BYTES
        self.start, self.end, self.is_last = start, end, self._stage.is_last
        self.weight_bytes = self._stage.weight_bytes
        self.kv: KvSlots = self._stage.kv

    def read(self, payload: Payload | None, *, num_tokens: int, dtype: str) -> NDArray[Any]:
        """Token ids [T], or the words [T] that hidden states begin with."""
        is_ids = dtype == TOKEN_DTYPE
        needed, size = (TOKEN_DTYPE, 4) if is_ids else (self.hidden_dtype, self._state_words * WORD_BYTES)
        raw = require_payload(payload, size=num_tokens * size, needed=needed, num_tokens=num_tokens, got=dtype)
        if not is_ids:
            return np.frombuffer(raw, dtype=np.uint64).reshape(num_tokens, self._state_words)[:, 0].copy()
        ids = np.frombuffer(raw, dtype=np.int32).copy()
        if not 0 <= ids.min() <= ids.max() < self._stage.vocab_size:
            raise MeasurementError(f"a token id is not in [0,{self._stage.vocab_size})")
        return ids

    def open(self, opened: OpenRequest) -> None:
        """Reserve slots; a hash model has no logits, so what needs them is refused."""
        _require_greedy(opened)
        self.kv.reserve(opened.request, opened.kv_tokens)

    def adopt(self, opened: OpenRequest) -> None:
        """Take over slots."""
        _require_greedy(opened)
        assert opened.adopts is not None, "nothing to adopt"
        self.kv.rename(opened.adopts, opened.request)

    def close(self, request: int) -> None:
        """Free the slots."""
        self.kv.release(request)

    def forward(self, items: Sequence[StageItem]) -> HashOutput:
        """Run one iteration."""
        return self._stage.forward(items)

    def drop(self) -> None:
        """A few numbers: nothing to give back."""

    def sample(self, output: HashOutput) -> tuple[Sampled, tuple[int, ...]]:
        """Greedy tokens."""
        ends = np.cumsum([item.num_tokens for item in output.items])
        rows = [(item.request, end - 1) for item, end in zip(output.items, ends.tolist(), strict=True) if item.sample]
        tokens = self._stage.tokens(output.words[[row for _, row in rows]])
        return Sampled(tuple((request, token) for (request, _), token in zip(rows, tokens, strict=True))), ()

    def write(self, output: HashOutput, rows: Sequence[slice]) -> memoryview:
        """Words, each followed by zeros up to the size of a hidden state."""
        words = np.concatenate([output.words[part] for part in rows])
        states = np.zeros((len(words), self._state_words), dtype=np.uint64)
        states[:, 0] = words
        return states.data.cast("B")


def _require_greedy(opened: OpenRequest) -> None:
    sampling = opened.sampling
    if sampling.temperature > 0 or sampling.num_logprobs is not None or opened.stop_token_ids:
        raise ValueError(
            f"request {opened.request}: a hash model decodes greedily, without log probabilities or a minimum "
            "output; send it with temperature 0 and neither of these"
        )
