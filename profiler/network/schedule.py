"""Which pairs of nodes are measured at the same time: never two that share a node. Pure."""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[str, str]  # (src, dst), directed


def rounds(names: Sequence[str]) -> list[list[Pair]]:
    """Every ordered pair ``(src, dst)`` once, in rounds in which no node takes part twice.

    The circle method: one name keeps its seat, the others move by one seat per round; the names facing each other are
    the pairs. Each round is followed by the same pairs reversed. ``2 * (n - 1)`` rounds for an even number of names,
    ``2 * n`` for an odd one.
    """
    seats: list[str | None] = [*names, *([None] if len(names) % 2 else [])]  # None: the name facing it sits out
    schedule: list[list[Pair]] = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        there = [(a, b) for a, b in pairs if a is not None and b is not None]
        schedule += [there, [(b, a) for a, b in there]] if there else []
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return schedule


def pack(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """These pairs in rounds in which no node takes part twice, each in the first round with room for it.

    At most ``2 d - 1`` rounds where no node is in more than ``d`` pairs: a pair is kept out of a round only by one of
    the ``d - 1`` others at either of its ends.
    """
    packed: list[list[Pair]] = []
    for pair in pairs:
        for others in packed:
            if not set(pair) & {name for other in others for name in other}:
                others.append(pair)
                break
        else:
            packed.append([pair])
    return packed
