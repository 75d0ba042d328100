"""Follow a placement's requests from several starts: which groups they gather in can depend on how they begin.

Under some limits on iterations a closed loop has several ways to go on for ever, with other groups and another
throughput: eight requests on three stages went round as three, three and two with 59 tokens/s, or as four and four with
51. Which way a server goes is chance, so what is expected is the mean over several draws of lengths and scatter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from helixbench.solver.problem.plan import Expected
from helixbench.solver.simulation.closed_loop import ClosedLoopResult


def follow_from(
    roll: Callable[[int], ClosedLoopResult | None], *, starts: int, max_work: int
) -> ClosedLoopResult | None:
    """The mean of rollouts with seeds 0, 1, ..., as many of ``starts`` as the work allows after the first.

    Args:
        roll: follows with that seed; ``None`` where that took too much work.
        starts: how many.
        max_work: of all of them.
    """
    first = roll(0)
    if first is None:
        return None
    found = [first]
    for seed in range(1, starts):
        if sum(one.work for one in found) + first.work > max_work:
            break
        if (another := roll(seed)) is not None:
            found.append(another)
    return mean_of(found)


def mean_of(found: Sequence[ClosedLoopResult]) -> ClosedLoopResult:
    """Of rollouts of one placement; it has settled if all have."""
    each = [one.expected for one in found]
    names = each[0].node_busy
    return ClosedLoopResult(
        expected=msgspec.structs.replace(
            each[0],
            total_tokens_per_s=statistics.fmean(one.total_tokens_per_s for one in each),
            output_tokens_per_s=statistics.fmean(one.output_tokens_per_s for one in each),
            ttft_s=_mean(one.ttft_s for one in each),
            tpot_s=_mean(one.tpot_s for one in each),
            low_total_tokens_per_s=_mean(one.low_total_tokens_per_s for one in each),
            high_total_tokens_per_s=_mean(one.high_total_tokens_per_s for one in each),
            node_busy={name: statistics.fmean(one.node_busy[name] for one in each) for name in names},
            node_batch_tokens=_batches(each),
        ),
        is_settled=all(one.is_settled for one in found),
        rounds=statistics.fmean(one.rounds for one in found),
        work=sum(one.work for one in found),
        totals=tuple(one.expected.total_tokens_per_s for one in found),
    )


def _batches(each: Sequence[Expected]) -> dict[str, float]:
    """Node -> mean decode tokens of an iteration."""
    return {name: statistics.fmean(one.node_batch_tokens[name] for one in each) for name in each[0].node_batch_tokens}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
