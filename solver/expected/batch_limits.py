"""Limits on iterations, chosen with the plan: they decide whether the stages of a pipeline work at the same time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from helixbench.solver.problem.capacity import RequestMix
from helixbench.solver.problem.plan import Expected

TOKEN_STEPS = (1.5, 3.0, 2.0, 1.0, 6.0, 4.0)
"""Limits on an iteration's tokens in the order in which they are tried, in units of a group's decoding sequences and
their prompt tokens."""

FINALISTS = 5
"""Limits that are simulated until they have settled."""


@dataclass(frozen=True)
class Batching:
    """Limits of every iteration: decoding sequences, and tokens in all; ``None`` for what the node can do."""

    max_decode_batch: int | None = None
    max_batch_tokens: int | None = None


ExpectedUnder: TypeAlias = Callable[[Batching], Expected | None]
"""What is expected under such limits; ``None`` where it took too much work to tell."""


def best_batching(
    expected_under: ExpectedUnder,
    *,
    in_flight: float,
    stages: int,
    mix: RequestMix,
    max_batch_tokens: int,
    thorough: bool,
    settled_under: ExpectedUnder | None = None,
) -> tuple[Batching, Expected] | None:
    """The limits that bring the most tokens/s, and what they bring; ``None`` where none of them could be simulated.

    The first to be tried are those that a plan most often ends with.

    Without a limit on decoding sequences the requests in flight gather in two or three groups however many stages there
    are, for a group that waits takes in the next; the other stages idle meanwhile. With as many prompt tokens in an
    iteration as a device can take, one stage after the other is held up by a long iteration, and groups gather behind
    it again. Iterations that are all about as long leave no gaps (Agrawal et al., Sarathi-Serve, OSDI 2024, sec. 4).

    Args:
        expected_under: what is expected under such limits.
        in_flight: requests.
        stages: of the longest pipeline.
        mix: of the workload.
        max_batch_tokens: the most that was measured.
        thorough: try all steps, and every number of groups from two to twice the stages, not only as many groups as
            stages and no limits.
        settled_under: the same, simulated until it has settled; decides between the ``FINALISTS`` that are best at
            first, for under some limits groups merge over time and under others they do not. Where none of them could
            be simulated for so long, the first look decides.
    """
    tried: dict[Batching, Expected] = {}

    def best() -> Batching:
        return max(tried, key=lambda batching: tried[batching].total_tokens_per_s)

    def consider(batching: Batching) -> None:
        found = None if batching in tried else expected_under(batching)
        if found is not None:
            tried[batching] = found

    per_stage = math.ceil(in_flight / max(2, stages))
    with_step = [
        Batching(per_stage, tokens if tokens < max_batch_tokens else None)
        for tokens in (math.ceil(step * per_stage * mix.tokens_per_output) for step in TOKEN_STEPS)
    ]
    consider(with_step[0])
    consider(Batching())
    if thorough:
        for batching in with_step[1:]:
            consider(batching)
        for groups in range(2, 2 * stages + 1):
            if tried:
                consider(Batching(math.ceil(in_flight / groups), best().max_batch_tokens))
    if not tried:
        return None
    if settled_under is not None:
        finalists = sorted(tried, key=lambda batching: -tried[batching].total_tokens_per_s)[:FINALISTS]
        settled = {batching: settled_under(batching) for batching in finalists}
        tried = {batching: found for batching, found in settled.items() if found is not None} or tried
    return best(), tried[best()]
