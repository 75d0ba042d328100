"""Workload: how long prompts and outputs are. From two numbers or from a trace of real requests."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from helixbench.errors import InputError
from helixbench.solver.problem.traces import Trace, read_trace


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Lengths of requests. ``lengths`` are (prompt tokens, output tokens), each at least 1, drawn with equal chance.

    ``notes`` say what of its source they leave out.
    """

    source: str
    lengths: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()

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
    *, prompt_tokens: int | None, output_tokens: int | None, trace: Trace | None
) -> Workload | None:
    """The workload that the shared command-line options describe; ``None`` where none of them is given.

    Raises:
        InputError: options that exclude each other, or that do not describe a workload.
    """
    if trace is not None:
        return workload_of_trace(trace)
    if prompt_tokens is None and output_tokens is None:
        return None
    if prompt_tokens is None or output_tokens is None:
        raise InputError("--prompt-tokens and --output-tokens: give both or neither")
    return fixed_workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def workload_of_trace(trace: Trace) -> Workload:
    """The lengths of a trace's requests."""
    lengths = tuple((request.prompt_tokens, request.output_tokens) for request in trace.requests)
    return Workload(source=trace.source, lengths=lengths, notes=trace.notes)


def trace_workload(path: Path, *, scale: float = 1.0) -> Workload:
    """The lengths of the requests in a file; see ``read_trace``."""
    return workload_of_trace(read_trace(path, scale=scale))
