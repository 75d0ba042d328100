"""How thoroughly links and network cards are measured."""

from __future__ import annotations

import msgspec

FULL_CURVE_BYTES = (256, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
SHORT_CURVE_BYTES = (1 << 10, 1 << 14, 1 << 18)


class NetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how often to measure.

    ``seconds`` of bandwidth for each pair and ``card_seconds`` of all pairs of a node at once; whole seconds, for
    iperf3 takes no others. Messages of ``message_bytes`` are timed unless one would take over ``message_limit_s``. A
    doubtful pair is measured ``max_attempts`` times at most, all of them in ``max_retry_rounds`` more rounds at most.

    ``measures_cards`` has all links of a node measured at once, too; ``two_cards_at_once`` what one node sends together
    with what another receives, in half of the time. ``one_pair_at_a_time`` is for networks in which pairs of different
    nodes share something too.
    """

    seconds: float = 2.0
    card_seconds: float = 3.0
    message_bytes: tuple[int, ...] = FULL_CURVE_BYTES
    message_limit_s: float = 2.0
    max_attempts: int = 3
    max_retry_rounds: int = 12
    measures_cards: bool = True
    two_cards_at_once: bool = False
    one_pair_at_a_time: bool = False


def in_a_profile(seconds: float) -> NetConfig:
    """As a part of ``helixbench profile``, where the nodes' compute takes most of the time."""
    return NetConfig(
        seconds=seconds,
        card_seconds=2.0,
        message_bytes=SHORT_CURVE_BYTES,
        message_limit_s=0.3,
        max_attempts=2,
        max_retry_rounds=2,
        two_cards_at_once=True,
    )
