"""StageRunner: a stage as a node's loop runs it, payload bytes in, tokens or payload bytes out.

Everything that depends on what a stage computes with (torch, NumPy) is behind it; the loop needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from helixbench.errors import MeasurementError
from helixbench.profiler.stage.batch import StageItem
from helixbench.profiler.stage.kv_slots import KvSlots
from helixbench.reference_server.wire.messages import Sampled
from helixbench.solver.scheduling.work import OpenRequest

Payload: TypeAlias = bytes | memoryview

TOKEN_DTYPE = "int32"  # of the token ids that enter at layer 0; hidden states name their own


class RunnerOutput(Protocol):
    """What one iteration computed: rows for each token of ``items``, in their order."""

    @property
    def items(self) -> tuple[StageItem, ...]:
        """The items that ran, perhaps in another order than they were given in."""


OutputT = TypeVar("OutputT", bound=RunnerOutput)


class StageRunner(Protocol[OutputT]):
    """Runs batches of one stage.

    Attributes:
        hidden_dtype: name of what hidden states are sent as, between nodes.
        kv: the slots that requests own.
    """

    hidden_dtype: str

    @property
    def start(self) -> int:
        """First layer of the stage's range ``[start, end)``."""

    @property
    def end(self) -> int:
        """End of the range."""

    @property
    def is_last(self) -> bool:
        """Whether the model ends here, so that tokens come out instead of hidden states."""

    @property
    def weight_bytes(self) -> int:
        """Weights of the stage."""

    @property
    def kv(self) -> KvSlots:
        """KV slots, and who owns them."""

    def read(self, payload: Payload | None, *, num_tokens: int, dtype: str) -> Any:
        """Inputs of that many tokens, one row each, in memory of their own.

        Raises:
            MeasurementError: the size does not match the number of tokens, or a token id is not in the vocabulary.
        """

    def open(self, opened: OpenRequest) -> None:
        """Reserve the request's KV slots and get ready to sample for it.

        Raises:
            ValueError: the slots are not free, or its sampling parameters are not supported.
            MeasurementError: the device has no memory to make room.
        """

    def adopt(self, opened: OpenRequest) -> None:
        """Take over the KV entries of the attempt that ``opened.adopts`` names, which is closed by it.

        Raises:
            ValueError: its sampling parameters are not supported.
        """

    def close(self, request: int) -> None:
        """Free what ``open`` reserved."""

    def forward(self, items: Sequence[StageItem]) -> OutputT:
        """Run one iteration.

        Raises:
            MeasurementError: the device has no memory for it.
        """

    def drop(self) -> None:
        """Give back the memory of weights and KV cache; nothing else is called after this."""

    def sample(self, output: OutputT) -> tuple[Sampled, tuple[int, ...]]:
        """Next tokens of the items that sample, with the scores that were asked for; only of the model's last stage.

        Beside them, requests that get none, because their logits are not finite.
        """

    def write(self, output: OutputT, rows: Sequence[slice]) -> memoryview:
        """Payload with the hidden states of those rows, one after the other."""


def require_payload(payload: Payload | None, *, size: int, needed: str, num_tokens: int, got: str) -> Payload:
    """Refuse a payload of another size or dtype than the stage reads.

    Raises:
        MeasurementError: naming both.
    """
    if payload is None or got != needed or len(payload) != size:
        came = "nothing" if payload is None else f"{len(payload)} bytes"
        raise MeasurementError(f"need {size} bytes of {needed} for {num_tokens} tokens, got {came} of {got}")
    return payload
