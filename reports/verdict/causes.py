"""Likely causes of a wrong prediction: which part of the model each node's residuals point to."""

from __future__ import annotations

from helixbench.reports.verdict.verdict import NodeResidual

# Smaller residuals are within the hour-to-hour variation of profiles of one machine.
NOTABLE = 0.10
SATURATED_BUSY = 0.95


def likely_causes(nodes: tuple[NodeResidual, ...], *, ratio: float | None) -> tuple[str, ...]:
    """Sentences, the largest residual first; empty if no residual is notable.

    Args:
        nodes: residuals of a measured run.
        ratio: measured / expected total tokens/s.
    """
    found = (cause for node in nodes for cause in (_iteration_cause(node), _batch_cause(node), _share_cause(node)))
    sentences = [sentence for _, sentence in sorted(filter(None, found), reverse=True)]
    is_cost_off = any(_iteration_cause(node) for node in nodes)
    busiest = max((node.measured_busy for node in nodes), default=0.0)
    if ratio is not None and ratio < 1 - NOTABLE and busiest < SATURATED_BUSY and not is_cost_off:
        sentences.append(
            f"no node was saturated (the busiest {busiest:.0%}): requests waited for links, the coordinator or KV cache"
        )
    return tuple(sentences)


def _iteration_cause(node: NodeResidual) -> tuple[float, str] | None:
    """Error of the cost model, unless the batch explains it: a larger batch takes longer, a smaller one less."""
    off = relative(node.measured_iteration_s, node.predicted_iteration_s)
    batch = relative(node.measured_batch_tokens, node.predicted_batch_tokens) or 0.0
    if off is None or abs(off) < NOTABLE or (abs(batch) >= NOTABLE and (batch > 0) == (off > 0)):
        return None
    word = "slower" if off > 0 else "faster"
    at = f"batches {abs(batch):.0%} {_size(batch)} than planned" if abs(batch) >= NOTABLE else "the planned batch"
    return abs(off), f"{node.name}: iterations are {abs(off):.0%} {word} than profiled, at {at}"


def _batch_cause(node: NodeResidual) -> tuple[float, str] | None:
    """Reported only where iteration times are right; otherwise wrong times explain the batches as well."""
    off = relative(node.measured_batch_tokens, node.predicted_batch_tokens)
    if off is None or abs(off) < NOTABLE or _iteration_cause(node):
        return None
    return abs(off), f"{node.name}: batches are {abs(off):.0%} {_size(off)} than planned: queueing differs"


def _size(off: float) -> str:
    return "larger" if off > 0 else "smaller"


def _share_cause(node: NodeResidual) -> tuple[float, str] | None:
    off = relative(node.realised_share, node.planned_share)
    if off is None or abs(off) < NOTABLE or node.layers is None:
        return None
    word = "more" if off > 0 else "less"
    return abs(off), f"{node.name}: {abs(off):.0%} {word} tokens than planned: routing deviates from the flows"


def relative(measured: float | None, predicted: float | None) -> float | None:
    """``measured / predicted - 1``; ``None`` if either is missing or the prediction is zero."""
    if measured is None or not predicted:
        return None
    return measured / predicted - 1
