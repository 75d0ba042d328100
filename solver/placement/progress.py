"""How a search goes: what it has, what is proven, and how long it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A moment of a search: best max-flow so far (``None`` before the first plan) and the proven bound, tokens/s.

    ``expected_tokens_per_s`` is what the best plan is expected to deliver, where that is what is searched for: then its
    max-flow may well fall while the plan gets better.
    """

    seconds: float
    incumbent_tokens_per_s: float | None
    bound_tokens_per_s: float
    doing: str
    expected_tokens_per_s: float | None = None

    @property
    def gap(self) -> float | None:
        """``(bound - incumbent) / incumbent``; ``None`` before the first plan."""
        if not self.incumbent_tokens_per_s:
            return None
        return max(0.0, self.bound_tokens_per_s - self.incumbent_tokens_per_s) / self.incumbent_tokens_per_s


OnProgress = Callable[[Progress], None]
