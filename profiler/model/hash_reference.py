"""Reference for hash models: the tokens of a request in plain integer arithmetic, without batches or layer ranges.

It shares no code with ``HashStage``. The outputs of a run are compared with it, so that a wrong layer, position, cache
entry or request shows as a wrong token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np

Word: TypeAlias = Any  # a 64-bit word: an int, or a uint64 array with one word for each of many sequences

MASK = 2**64 - 1
_MAX_SUMS = 1 << 24  # words that are held to check many sequences in step: 128 MiB


def mix(word: Word) -> Word:
    """A bijection of 64-bit words (of any integer modulo 2**64) that carries high bits down and low bits up."""
    word = word & MASK
    word = (word ^ (word >> 32)) * 0xD6E8FEB86659FD93 & MASK
    return word ^ (word >> 32)


class HashSequence:
    """One sequence that passes a hash model token by token (or, as arrays, many of them in step)."""

    def __init__(self, *, num_layers: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._sums: list[list[Word]] = [[] for _ in range(num_layers)]  # layer -> sum of its keys up to each position

    def next_token(self, token: Word) -> Word:
        """Append ``token``; the model's greedy choice of the token after it."""
        word = mix(token + 1)
        for layer, sums in enumerate(self._sums):
            position = len(sums)
            before = sums[-1] if position else 0
            recalled = sums[mix(position) % position] if position else 0
            sums.append((before + mix(word + position)) & MASK)
            word = (word * (mix(layer + 1) | 1) + mix(before + 3 * recalled + layer + 1)) & MASK
        return mix(word) % self._vocab_size


def reference_tokens(
    prompt: Sequence[int],
    *,
    max_tokens: int,
    num_layers: int,
    vocab_size: int,
    stop_token_ids: Collection[int] = (),
) -> list[int]:
    """Output of a request: ``max_tokens`` tokens, or fewer where one of ``stop_token_ids`` ends it."""
    sequence = HashSequence(num_layers=num_layers, vocab_size=vocab_size)
    output = [[sequence.next_token(token) for token in prompt][-1]]
    while len(output) < max_tokens and output[-1] not in stop_token_ids:
        output.append(sequence.next_token(output[-1]))
    return output


class Output(msgspec.Struct, frozen=True):
    """Tokens that were served to a request for its prompt."""

    request: int
    prompt: Sequence[int]
    tokens: Sequence[int]


def first_differences(outputs: Sequence[Output], *, num_layers: int, vocab_size: int) -> dict[int, int]:
    """Request -> index of its first output token that differs from the reference; requests without one are left out.

    Each token is compared with the reference's choice after the prompt and the *served* tokens before it. If all agree,
    so do the outputs as a whole, and no sequence has to wait for its own last token: they are checked abreast.
    """
    waiting = sorted(outputs, key=_num_tokens)
    found: dict[int, int] = {}
    while waiting:
        num_abreast = max(1, _MAX_SUMS // (num_layers * _num_tokens(waiting[-1])))  # the longest first
        some, waiting = waiting[-num_abreast:], waiting[:-num_abreast]
        served = np.zeros((len(some), _num_tokens(some[-1])), dtype=np.uint64)  # [R, longest]
        for index, output in enumerate(some):
            served[index, : _num_tokens(output)] = [*output.prompt, *output.tokens]
        firsts = np.array([len(output.prompt) for output in some])  # positions of output tokens: [first, end)
        ends = np.array([_num_tokens(output) for output in some])
        sequences = HashSequence(num_layers=num_layers, vocab_size=vocab_size)
        for position in range(1, served.shape[1]):
            is_wrong = sequences.next_token(served[:, position - 1]) != served[:, position]
            for row in np.flatnonzero(is_wrong & (firsts <= position) & (position < ends)):
                found.setdefault(some[row].request, position - int(firsts[row]))
    return found


def _num_tokens(output: Output) -> int:
    return len(output.prompt) + len(output.tokens)
