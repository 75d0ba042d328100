"""What a node's network card carries: the sum over its links when all of them send, or receive, at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from helixbench.profiler.network.schedule import Pair

Direction = Literal["out", "in"]

# Links that share nothing carry at once what each carries alone. Below this part of it they share something.
SHARED_BELOW = 0.9


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One direction of a node's card.

    ``at_once_bytes_per_s`` is the sum over ``num_links`` links that were busy together, ``alone_bytes_per_s`` the sum
    of what each carries alone and ``best_bytes_per_s`` the best of these. ``at_once_bytes_per_s`` is ``None`` where
    that was not measured, for the reason in ``problem``.
    """

    node: str
    direction: Direction
    num_links: int
    best_bytes_per_s: float
    alone_bytes_per_s: float
    at_once_bytes_per_s: float | None = None
    problem: str = ""

    @property
    def is_shared(self) -> bool | None:
        """Whether the links share the card's bandwidth; ``None`` where one link, or no measurement, cannot tell."""
        if self.at_once_bytes_per_s is None or self.num_links < 2:
            return None
        return self.at_once_bytes_per_s < SHARED_BELOW * self.alone_bytes_per_s

    def limit_bytes_per_s(self, *, is_limited: bool = False) -> float | None:
        """What bounds the sum over the node's links; ``None`` where the links bind before the card does.

        The best link alone shows what the card carries at least, so it stands where the sum came out lower.

        Args:
            is_limited: whether the card is known to be limited. Where nothing was measured at once, the best link is
                then taken for what it carries.
        """
        if self.is_shared:
            assert self.at_once_bytes_per_s is not None
            return max(self.at_once_bytes_per_s, self.best_bytes_per_s)
        if self.is_shared is None and is_limited:
            return self.best_bytes_per_s
        return None

    def source(self, *, is_limited: bool = False) -> str:
        """Where ``limit_bytes_per_s`` comes from; empty where there is none."""
        if self.limit_bytes_per_s(is_limited=is_limited) is None:
            return ""
        if not self.is_shared:
            return f"{self.direction}: best of {self.num_links} links alone" + (
                f" (all at once: {self.problem})" if self.problem else ""
            )
        assert self.at_once_bytes_per_s is not None
        if self.at_once_bytes_per_s < self.best_bytes_per_s:
            return f"{self.direction}: best of {self.num_links} links alone, more than all at once"
        return f"{self.direction}: {self.num_links} links at once"


def make_card(
    node: str,
    direction: Direction,
    alone: Mapping[Pair, float],
    at_once: Mapping[Pair, float],
    *,
    problem: str = "",
) -> Card | None:
    """The card of a node out of its links alone and at once, in bytes/s; ``None`` where no link of it was measured.

    Only links that were measured both ways are compared; none at once is a card of which only the links are known.
    """
    end = 0 if direction == "out" else 1
    own = {pair: rate for pair, rate in alone.items() if pair[end] == node}
    together = {pair: rate for pair, rate in at_once.items() if pair in own}
    if not own:
        return None
    compared = together or own
    return Card(
        node=node,
        direction=direction,
        num_links=len(compared),
        best_bytes_per_s=max(own.values()),
        alone_bytes_per_s=sum(own[pair] for pair in compared),
        at_once_bytes_per_s=sum(together.values()) if together else None,
        problem=problem,
    )
