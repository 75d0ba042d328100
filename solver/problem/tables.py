"""Stage times of a node of which only a capacity table is known.

A table says tokens/s with ``k`` layers held, at a batch that is usual with so many layers, and nothing of a single
iteration. What is assumed beside it is what the published tables and the published timings of the same GPUs have in
common (``docs/design/two-numbers.md``): with one layer held an iteration has ``USUAL_TOKENS``, and ``FIXED_SHARE`` of
its time does not depend on them, for that is what reading the layer's weights takes. Each further layer takes that
fixed time again. Where a table falls faster than one over the layers, its batches are smaller.

The workload has no part in it: fewer or shorter requests never make an iteration longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from helixbench.profiler.cost.model import StageCost

USUAL_TOKENS = 48
"""Tokens of an iteration with one layer held. The published timings give the published tables at 35 to 61."""

FIXED_SHARE = 0.8
"""Share of that iteration's time that does not depend on its tokens: 0.77 to 0.92 by the published timings."""

LEAST_FIXED_SHARE = 0.6
"""The same where a table falls far slower than one over the layers."""

TABLE_NOTE = (
    f"nodes with only a capacity table: its tokens/s are taken at iterations of {USUAL_TOKENS} tokens with one layer "
    f"held, fewer where it falls faster than one over the layers; {FIXED_SHARE:.0%} of a layer's time there does not "
    "depend on the tokens; admission fills 80 % of the KV cache unless told otherwise (docs/design/two-numbers.md)"
)


def table_cost(table: Sequence[float], num_layers: int) -> StageCost:
    """Stage times with that many layers held, whatever the layer at which requests enter.

    ``max_tokens``, a whole number, is the largest iteration: there the node carries the table's tokens/s, and with
    fewer tokens it carries less. With ``f`` seconds fixed and ``c`` seconds a token for one layer, the batch ``n`` of
    ``k`` layers solves ``n / T(k) = k * (f + c * n)``.

    Args:
        table: tokens/s with 1, 2, ... layers held.
        num_layers: held, at most as many as the table has.
    """
    tokens_per_s = table[num_layers - 1]
    kept = num_layers * tokens_per_s / table[0]  # of what one over the layers would leave
    fixed = max(LEAST_FIXED_SHARE, 1 - (1 - FIXED_SHARE) * kept)
    tokens = max(1, round(FIXED_SHARE * USUAL_TOKENS * kept / fixed))
    seconds = tokens / tokens_per_s
    return StageCost.with_zeros(
        step_s=fixed * seconds,
        step_token_s=(1 - fixed) * seconds / tokens,
        max_tokens=float(tokens),
        max_context_tokens=float("inf"),
    )
