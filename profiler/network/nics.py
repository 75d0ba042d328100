"""NIC capacity of a node: the sum over its links while all of them send, or receive, at once. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from helixbench.profiler.network.schedule import Pair

Direction = Literal["out", "in"]

# Links that share nothing carry at once what each carries alone. Below this part of it they share the NIC.
SHARED_BELOW = 0.9


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a node's NIC, in bytes/s over ``num_links`` links.

    ``at_once_bytes_per_s`` is their sum while all are busy, ``None`` where that was not measured, for the reason in
    ``problem``; ``alone_bytes_per_s`` is the sum of each alone, ``best_bytes_per_s`` the best alone.
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
        """Whether the links share the NIC's bandwidth; ``None`` where one link, or no measurement, cannot tell."""
        if self.at_once_bytes_per_s is None or self.num_links < 2:
            return None
        return self.at_once_bytes_per_s < SHARED_BELOW * self.alone_bytes_per_s

    def limit_bytes_per_s(self, *, is_limited: bool = False) -> float | None:
        """Bound on the sum over the node's links; ``None`` where the links bind before the NIC does.

        The best link alone proves what the NIC carries at least, so it is the bound where the sum came out lower.

        Args:
            is_limited: whether the testbed limits the NIC. Then the best link is its bound where nothing was measured
                at once.
        """
        if self.is_shared:
            assert self.at_once_bytes_per_s is not None
            return max(self.at_once_bytes_per_s, self.best_bytes_per_s)
        return self.best_bytes_per_s if self.is_shared is None and is_limited else None

    def scaled(self, factor: float) -> Nic:
        """The NIC with all rates multiplied."""
        at_once = None if self.at_once_bytes_per_s is None else factor * self.at_once_bytes_per_s
        return msgspec.structs.replace(
            self,
            best_bytes_per_s=factor * self.best_bytes_per_s,
            alone_bytes_per_s=factor * self.alone_bytes_per_s,
            at_once_bytes_per_s=at_once,
        )

    def source(self, *, is_limited: bool = False) -> str:
        """Where ``limit_bytes_per_s`` comes from; empty where there is none."""
        if self.limit_bytes_per_s(is_limited=is_limited) is None:
            return ""
        if not self.is_shared:
            why = f" (all at once: {self.problem})" if self.problem else ""
            return f"{self.direction}: best of {self.num_links} links alone{why}"
        assert self.at_once_bytes_per_s is not None
        if self.at_once_bytes_per_s < self.best_bytes_per_s:
            return f"{self.direction}: best of {self.num_links} links alone, more than all at once"
        return f"{self.direction}: {self.num_links} links at once"


def make_nic(
    node: str,
    direction: Direction,
    alone: Mapping[Pair, float],
    at_once: Mapping[Pair, float],
    *,
    problem: str = "",
) -> Nic | None:
    """A node's NIC from its links alone and at once, in bytes/s; ``None`` where none of its links was measured.

    Only links that were measured both ways are compared.
    """
    end = 0 if direction == "out" else 1
    own = {pair: rate for pair, rate in alone.items() if pair[end] == node}
    together = {pair: rate for pair, rate in at_once.items() if pair in own}
    if not own:
        return None
    compared = together or own
    return Nic(
        node=node,
        direction=direction,
        num_links=len(compared),
        best_bytes_per_s=max(own.values()),
        alone_bytes_per_s=sum(own[pair] for pair in compared),
        at_once_bytes_per_s=sum(together.values()) if together else None,
        problem=problem,
    )
