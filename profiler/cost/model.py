"""The stage-time model: seconds of one iteration of a layer range over a batch, as one list of terms.

Each term is a coefficient, in seconds per unit, times a quantity of the batch: once per iteration, per layer, in the
first stage (embedding) or in the last (norm, LM head, sampling). ``TERMS`` lists them; the time of a batch, the time
with requests that enter late, the columns of the fit and the printed table all follow from that list. Coefficients are
not negative and the term in tokens is piecewise linear, so the time never falls when a batch grows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

GATHER_UP_TO_TOKENS = {"cpu": 0, "cuda": 1 << 30}
"""Device type -> longest context that is gathered; see ``attention.RaggedBatch``.

On CPU copying costs about what the calls that it saves do, and contexts of different lengths make several groups, which
no mean context tells: four of 30 to 180 tokens took 364 us a layer gathered and 263 one by one, four of 100 took 260
and 231. On a GPU every call is a launch, and hundreds of them take longer than any copy.
"""


class BatchShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An iteration in the counts that its time depends on. Means over iterations are allowed, so counts are floats.

    Attributes:
        prefill_tokens: prompt tokens in the batch, over all chunks.
        prefill_chunks: number of prompt chunks.
        prefill_pairs: (query, key) pairs that the chunks attend: sum of ``chunk * past + chunk * (chunk + 1) / 2``.
        decode_tokens: decoding sequences, one token each.
        decode_context_tokens: cached tokens read by them, summed over the sequences.
        sampled_tokens: sequences that leave with a new token: the decoding ones and the chunks that end a prompt.
    """

    prefill_tokens: float = 0.0
    prefill_chunks: float = 0.0
    prefill_pairs: float = 0.0
    decode_tokens: float = 0.0
    decode_context_tokens: float = 0.0
    sampled_tokens: float = 0.0

    @property
    def tokens(self) -> float:
        """New tokens in the batch."""
        return self.prefill_tokens + self.decode_tokens


Counts: TypeAlias = Sequence[float]
"""The fields of a ``BatchShape``, in their order."""

Scope: TypeAlias = Literal["step", "layer", "embedding", "head"]
"""How often a term counts: once in an iteration, in each layer, in the first stage, in the last."""

SCOPES: tuple[Scope, ...] = ("step", "layer", "embedding", "head")


class Bends(NamedTuple):
    """Where the quantities that are not linear in the counts change their slope; see ``StageCost``."""

    token_knots: tuple[float, ...]
    gather_up_to_tokens: float = 0.0


class Curve(Protocol):
    """Quantities that are not linear in the counts of a batch."""

    def quantities(self, counts: Counts, bends: Bends) -> list[float]:
        """One for each coefficient."""
        ...

    def compiled(self, coefficients: Sequence[float], bends: Bends) -> Callable[[Counts], float]:
        """Coefficients times quantities, as a function of the counts."""
        ...


class _TokenSegments:
    """New tokens between knot ``k`` and knot ``k + 1``; the last segment is open."""

    def quantities(self, counts: Counts, bends: Bends) -> list[float]:
        tokens = counts[0] + counts[3]
        ends = (*bends.token_knots[1:], float("inf"))
        return [max(0.0, min(tokens, end) - begin) for begin, end in zip(bends.token_knots, ends, strict=True)]

    def compiled(self, coefficients: Sequence[float], bends: Bends) -> Callable[[Counts], float]:
        knots = bends.token_knots
        at_knots = [0.0]  # seconds at each knot
        for (begin, end), slope in zip(pairwise(knots), coefficients, strict=False):
            at_knots.append(at_knots[-1] + (end - begin) * slope)

        def seconds(counts: Counts) -> float:
            tokens = counts[0] + counts[3]
            segment = bisect_right(knots, tokens) - 1
            return at_knots[segment] + (tokens - knots[segment]) * coefficients[segment] if segment >= 0 else 0.0

        return seconds


class _GatheredContext:
    """Cached tokens that are copied together so that several sequences are attended in one call."""

    def quantities(self, counts: Counts, bends: Bends) -> list[float]:
        decodes, context_tokens = counts[3], counts[4]
        if decodes <= 1.0:
            return [0.0]
        return [(decodes - 1.0) * min(bends.gather_up_to_tokens, context_tokens / decodes)]

    def compiled(self, coefficients: Sequence[float], bends: Bends) -> Callable[[Counts], float]:
        return lambda counts: coefficients[0] * self.quantities(counts, bends)[0]


@dataclass(frozen=True)
class Term:
    """``coefficient``, a field of ``StageCost``, times the sum of some counts of a batch, or 1, or a curve's."""

    coefficient: str
    scope: Scope
    counts: tuple[str, ...] = ()
    curve: Curve | None = None

    def quantities(self, counts: Counts, bends: Bends) -> list[float]:
        """What the coefficient multiplies: one number, or one for each of several coefficients."""
        if self.curve is not None:
            return self.curve.quantities(counts, bends)
        return [sum(counts[index] for index in self._indices) if self.counts else 1.0]

    @property
    def _indices(self) -> tuple[int, ...]:
        return tuple(BatchShape.__struct_fields__.index(name) for name in self.counts)


_ITEMS = ("prefill_chunks", "decode_tokens")
_TOKENS = ("prefill_tokens", "decode_tokens")

TERMS = (
    Term("step_s", "step"),
    Term("step_item_s", "step", _ITEMS),
    Term("step_token_s", "step", _TOKENS),
    Term("layer_s", "layer"),
    Term("layer_token_s", "layer", curve=_TokenSegments()),
    Term("layer_decode_item_s", "layer", ("decode_tokens",)),
    Term("layer_decode_context_s", "layer", ("decode_context_tokens",)),
    Term("layer_prefill_chunk_s", "layer", ("prefill_chunks",)),
    Term("layer_prefill_pair_s", "layer", ("prefill_pairs",)),
    Term("embed_s", "embedding"),
    Term("embed_token_s", "embedding", _TOKENS),
    Term("head_s", "head"),
    Term("head_item_s", "head", ("sampled_tokens",)),
    Term("layer_gather_context_s", "layer", curve=_GatheredContext()),
)


class _ScopeTime:
    """Seconds of all terms of one scope, with the linear ones summed up to one weight for each count."""

    def __init__(self, cost: StageCost, scope: Scope) -> None:
        constant, weights = 0.0, [0.0] * len(BatchShape.__struct_fields__)
        self._curves: list[Callable[[Counts], float]] = []
        for term in (term for term in TERMS if term.scope == scope):
            coefficients = cost.values_of(term)
            if term.curve is None:
                constant += 0.0 if term.counts else coefficients[0]
                for index in term._indices:
                    weights[index] += coefficients[0]
            elif any(coefficients):
                self._curves.append(term.curve.compiled(coefficients, cost.bends))
        self._linear = (constant, *weights)

    def __call__(self, counts: Counts) -> float:
        constant, w0, w1, w2, w3, w4, w5 = self._linear
        n0, n1, n2, n3, n4, n5 = counts
        seconds = constant + n0 * w0 + n1 * w1 + n2 * w2 + n3 * w3 + n4 * w4 + n5 * w5
        for curve in self._curves:
            seconds += curve(counts)
        return seconds


class StageCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Coefficients of the stage-time model of one node, all in seconds per the named unit; see ``TERMS``.

    ``token_knots`` and ``layer_token_s`` have one length: tokens of the batch between knot ``k`` and knot ``k + 1``
    cost ``layer_token_s[k]`` each per layer (the last segment is open). The first knot is 1: a batch's first token is
    in ``layer_s``.

    Contexts of up to ``gather_up_to_tokens`` are copied together where several sequences decode (``attention``), which
    ``layer_gather_context_s`` is the price of, on top of reading them; a longer context is attended by itself, which
    costs about as much as copying one of that length.

    ``variation`` is the relative standard deviation of single iterations around their mean. It costs throughput where
    nodes wait for each other.

    ``max_tokens`` and ``max_context_tokens`` bound what was measured; times beyond them are extrapolated.
    """

    step_s: float
    step_item_s: float
    step_token_s: float
    layer_s: float
    token_knots: tuple[float, ...]
    layer_token_s: tuple[float, ...]
    layer_decode_item_s: float
    layer_decode_context_s: float
    layer_prefill_chunk_s: float
    layer_prefill_pair_s: float
    embed_s: float
    embed_token_s: float
    head_s: float
    head_item_s: float
    max_tokens: float
    max_context_tokens: float
    layer_gather_context_s: float = 0.0
    gather_up_to_tokens: float = 0.0
    variation: float = 0.0

    def __post_init__(self) -> None:
        if len(self.token_knots) != len(self.layer_token_s) or not self.token_knots or self.token_knots[0] != 1:
            raise ValueError("token_knots and layer_token_s: need one length, at least one entry, and first knot 1")
        if any(b <= a for a, b in pairwise(self.token_knots)):
            raise ValueError("token_knots: need ascending values")
        if not np.all(np.isfinite(self.coefficients())) or float(self.coefficients().min()) < 0:
            raise ValueError("coefficients: need finite values >= 0 seconds")

    @classmethod
    def of(cls, coefficients: FloatArray, bends: Bends, **rest: float) -> Self:
        """From coefficients in the order of ``feature_row``, and the fields that are none."""
        where = columns(bends)
        fields: dict[str, Any] = {}
        for term in TERMS:
            values = tuple(float(value) for value in coefficients[where[term.coefficient]])
            fields[term.coefficient] = values if isinstance(term.curve, _TokenSegments) else values[0]
        return cls(**(fields | bends._asdict() | rest))

    @classmethod
    def with_zeros(cls, **fields: Any) -> Self:
        """From some fields; all coefficients that are not among them are 0."""
        zeros: dict[str, Any] = {term.coefficient: 0.0 for term in TERMS}
        return cls(**(zeros | {"token_knots": (1.0,), "layer_token_s": (0.0,)} | fields))

    @property
    def bends(self) -> Bends:
        """Where quantities change their slope."""
        return Bends(self.token_knots, self.gather_up_to_tokens)

    def values_of(self, term: Term) -> tuple[float, ...]:
        """The coefficients of a term."""
        value = getattr(self, term.coefficient)
        return value if isinstance(value, tuple) else (value,)

    def coefficients(self) -> FloatArray:
        """All coefficients in the order of ``feature_row``, shape [features]."""
        return np.array([value for term in TERMS for value in self.values_of(term)])

    @cached_property
    def scopes(self) -> Mapping[Scope, Callable[[Counts], float]]:
        """Scope -> seconds of its terms as a function of the counts of a batch."""
        return {scope: _ScopeTime(self, scope) for scope in SCOPES}

    def scaled(self, factor: float) -> StageCost:
        """The cost of a node that takes ``factor`` times as long for everything."""
        fields = {term.coefficient: tuple(factor * value for value in self.values_of(term)) for term in TERMS}
        scalars = {name: values for name, values in fields.items() if isinstance(getattr(self, name), tuple)}
        return msgspec.structs.replace(self, **{name: values[0] for name, values in fields.items()} | scalars)

    def time_s(self, *, num_layers: float, batch: BatchShape, first: bool, last: bool) -> float:
        """Seconds of one iteration of ``num_layers`` layers, with the embedding and the head where asked for.

        0 layers stand for the embedding or the head timed alone, outside any iteration.
        """
        counts, scopes = msgspec.structs.astuple(batch), self.scopes
        seconds = num_layers * scopes["layer"](counts)
        if num_layers > 0:
            seconds += scopes["step"](counts)
        if first:
            seconds += scopes["embedding"](counts)
        if last:
            seconds += scopes["head"](counts)
        return seconds

    def time_with_entries_s(self, entries: Mapping[int, Counts], *, end: int, last: bool) -> float:
        """Seconds of one iteration up to layer ``end`` whose work enters at several layers (entry layer -> counts).

        It runs layer by layer with all that has entered so far, from the first entry on; entries ascend.
        """
        scopes = self.scopes
        seconds, layer_s, begin = 0.0, 0.0, end
        total: Counts = ()
        for entry, counts in entries.items():
            seconds += (entry - begin) * layer_s
            begin = entry
            total = [sum(pair) for pair in zip(total, counts, strict=True)] if total else counts
            layer_s = scopes["layer"](total)
            if entry == 0:
                seconds += scopes["embedding"](counts)
        seconds += (end - begin) * layer_s + scopes["step"](total)
        return seconds + scopes["head"](total) if last else seconds

    def scope_s(self, scope: Scope, batch: BatchShape) -> float:
        """Seconds of one scope: of one layer, of the embedding, of the head, or of the rest of an iteration."""
        return self.scopes[scope](msgspec.structs.astuple(batch))


def feature_row(*, num_layers: float, batch: BatchShape, first: bool, last: bool, bends: Bends) -> FloatArray:
    """The quantities that ``StageCost.coefficients`` multiply to give ``StageCost.time_s``, shape [features]."""
    counts = msgspec.structs.astuple(batch)
    times: dict[Scope, float] = {
        "step": float(num_layers > 0),
        "layer": num_layers,
        "embedding": float(first),
        "head": float(last),
    }
    return np.array([times[term.scope] * quantity for term in TERMS for quantity in term.quantities(counts, bends)])


def columns(bends: Bends) -> dict[str, slice]:
    """Coefficient -> its places in ``feature_row``."""
    found, at = {}, 0
    for term in TERMS:
        size = len(term.quantities((0.0,) * len(BatchShape.__struct_fields__), bends))
        found[term.coefficient] = slice(at, at + size)
        at += size
    return found
