"""Workload: how long prompts and outputs are. From two numbers or from a trace of real requests."""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from helixbench.errors import InputError


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lengths of requests. ``lengths`` are (prompt tokens, output tokens), each at least 1, drawn with equal chance."""

    source: str
    lengths: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths: need at least one (prompt, output) pair")
        if min(min(pair) for pair in self.lengths) < 1:
            raise ValueError("lengths: need prompt and output of at least 1 token")

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean prompt length."""
        return float(np.mean([prompt for prompt, _ in self.lengths]))

    @property
    def mean_output_tokens(self) -> float:
        """Mean output length."""
        return float(np.mean([output for _, output in self.lengths]))

    @property
    def max_kv_tokens(self) -> int:
        """KV cache that the longest request reserves."""
        return max(prompt + output for prompt, output in self.lengths)


_CANDIDATES = 32
"""Lengths that one is chosen from; of fewer than twice as many lengths half of them, for those left over wait long."""


def draw_lengths(workload: Workload, rng: random.Random) -> Iterator[tuple[int, int]]:
    """(prompt, output) tokens of request after request, without end; each length comes as often as any other.

    Independent draws from a trace give a window of some dozens of requests 10 % more or fewer tokens than its mean, and
    15 % more or fewer output tokens for each of the prompt, and so the run and what it is held against would differ by
    their draws. Here a few drawn at random wait, and the one comes first with which prompt tokens, output tokens and
    attended pairs of all so far are closest to the mean's.

    Source: herding (Welling, Herding dynamical weights to learn, ICML 2009), of samples that are drawn without
    replacement.
    """
    sizes = _relative_sizes(workload.lengths)
    ahead = np.zeros(sizes.shape[1])  # of as many requests of mean size
    undrawn: list[int] = []
    waiting: list[int] = []
    candidates = max(1, min(_CANDIDATES, len(sizes) // 2))
    while True:
        while len(waiting) < candidates:
            undrawn = undrawn or list(range(len(sizes)))
            waiting.append(_take(undrawn, rng.randrange(len(undrawn))))
        number = _take(waiting, int(np.square(sizes[waiting] + ahead).sum(axis=1).argmin()))
        ahead += sizes[number]
        yield workload.lengths[number]


@functools.lru_cache(maxsize=4)
def _relative_sizes(lengths: tuple[tuple[int, int], ...]) -> NDArray[np.float64]:
    """How much larger than the mean each is in prompt tokens, output tokens and attended pairs, shape [lengths, 3]."""
    prompt, output = np.array(lengths, dtype=float).T
    sizes = np.stack([prompt, output, (prompt + output) ** 2 / 2], axis=1)
    return np.asarray(sizes / sizes.mean(axis=0) - 1.0)


def _take(numbers: list[int], at: int) -> int:
    """Remove one of them; their order does not matter."""
    numbers[at], numbers[-1] = numbers[-1], numbers[at]
    return numbers.pop()


def fixed_workload(*, prompt_tokens: int, output_tokens: int) -> Workload:
    """Every request alike.

    Raises:
        InputError: a length below 1.
    """
    if prompt_tokens < 1 or output_tokens < 1:
        raise InputError(f"--prompt-tokens {prompt_tokens} --output-tokens {output_tokens}: need at least 1 of each")
    return Workload(source=f"fixed {prompt_tokens} in, {output_tokens} out", lengths=((prompt_tokens, output_tokens),))


def workload_of_options(
    *, prompt_tokens: int | None, output_tokens: int | None, trace: Path | None, trace_scale: float
) -> Workload | None:
    """The workload that the shared command-line options describe; ``None`` where none of them is given.

    Raises:
        InputError: options that exclude each other, or that do not describe a workload.
    """
    if trace is not None:
        if prompt_tokens is not None or output_tokens is not None:
            raise InputError("--trace and --prompt-tokens/--output-tokens: give one of them")
        return trace_workload(trace, scale=trace_scale)
    if prompt_tokens is None and output_tokens is None:
        return None
    if prompt_tokens is None or output_tokens is None:
        raise InputError("--prompt-tokens and --output-tokens: give both or neither")
    return fixed_workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def trace_workload(path: Path, *, scale: float = 1.0, max_requests: int | None = None) -> Workload:
    """Lengths of a CSV trace with the columns ``ContextTokens`` and ``GeneratedTokens`` (the Azure LLM traces).

    Args:
        path: the trace.
        scale: every length is multiplied by this and rounded up to at least 1.
        max_requests: take only that many rows from the start.

    Raises:
        InputError: not such a file, no usable row, or a scale that is no finite number above 0.
    """
    if not 0 < scale < float("inf"):
        raise InputError(f"--trace-scale {scale}: need a finite number of more than 0")
    lengths: list[tuple[int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = {"ContextTokens", "GeneratedTokens"} - set(rows.fieldnames or ())
            if missing:
                raise InputError(f"{path}: no column {', '.join(sorted(missing))}; need ContextTokens, GeneratedTokens")
            for row in rows:
                if max_requests is not None and len(lengths) >= max_requests:
                    break
                lengths.append(_scaled_lengths(row, scale, origin=f"{path}:{rows.line_num}"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a CSV trace ({error})") from error
    if not lengths:
        raise InputError(f"{path}: no requests in it")
    suffix = "" if scale == 1.0 else f" x {scale:g}"
    return Workload(source=f"{path.name}{suffix}", lengths=tuple(lengths))


def _scaled_lengths(row: dict[str, str], scale: float, *, origin: str) -> tuple[int, int]:
    try:
        prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: ContextTokens and GeneratedTokens must be whole numbers ({error})") from error
    try:
        return max(1, round(prompt * scale)), max(1, round(output * scale))
    except OverflowError as error:
        raise InputError(f"{origin}: {prompt} and {output} tokens x --trace-scale {scale:g} are too many") from error
