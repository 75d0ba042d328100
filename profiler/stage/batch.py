"""Batch of a stage: what each sequence brings to one iteration."""

from __future__ import annotations

from typing import Any

import msgspec


class StageItem(msgspec.Struct, frozen=True):
    """One sequence's part of a batch.

    Attributes:
        request: whose KV slots are used.
        past: tokens of the sequence that are cached already.
        num_tokens: new tokens, at positions ``past ...``.
        entry_layer: model layer at which they enter (partial inference when later than the stage's first).
        sample: whether the last of them yields a token; only where the stage ends the model.
        inputs: token ids where they enter at layer 0, else hidden states, in the stage's own type of array.
    """

    request: int
    past: int
    num_tokens: int
    entry_layer: int
    sample: bool
    inputs: Any
