"""The tc commands that limit what leaves a network interface. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping

# Jumbo frames: headers then take 0.7 % of the rate, so what a program measures is what the file says.
MTU_BYTES = 9000
_FRAME_BYTES = MTU_BYTES + 14
# A class may send this long at full speed after a pause: covers a late timer, and is less than a message takes.
_BURST_S = 0.002
# How much a queue holds: a switch with this much buffer loses nothing unless several nodes send to one at once.
_QUEUE_S = 0.1
_MIN_QUEUE_BYTES = 512 * 1024
# TCP hands down up to 64 KiB at once, and a class sends it as one: on a slow link that would hold up a small message
# far longer than frames do.
_SEGMENT_S = 0.002
_MAX_SEGMENT_BYTES = 65_536
# What a class may send before the next one's turn. Given, for the kernel's guess from the rate draws a warning.
_QUANTUM_BYTES = 60_000
_OTHERS_CLASS = 0x10
_FIRST_PEER_CLASS = 0x11


def egress_commands(
    device: str, *, card_bytes_per_s: float | None, peer_bytes_per_s: Mapping[str, float] | None = None
) -> list[str]:
    """Lines for ``tc -batch`` that limit what leaves ``device``; none where nothing is limited.

    Args:
        device: the interface, not shaped so far.
        card_bytes_per_s: limit over all that leaves it; ``None`` for none.
        peer_bytes_per_s: IPv4 address -> limit of what goes there.
    """
    peers = dict(peer_bytes_per_s or {})
    if card_bytes_per_s is None and not peers:
        return []
    root = f"dev {device} parent 1:"
    classes = {address: minor for minor, address in enumerate(peers, start=_FIRST_PEER_CLASS)}  # address -> class
    if card_bytes_per_s is None:
        lines = [f"qdisc add dev {device} root handle 1: htb default 0"]  # no class: what no filter claims is not held
        for address, rate in peers.items():
            lines += _leaf(device, parent="1:", minor=classes[address], rate=rate, ceil=rate)
    else:
        lines = [
            f"qdisc add dev {device} root handle 1: htb default {_OTHERS_CLASS:x}",
            f"class add {root} classid 1:1 {_htb(card_bytes_per_s, card_bytes_per_s)}",
        ]
        ceilings = {_OTHERS_CLASS: card_bytes_per_s}
        ceilings |= {classes[address]: min(rate, card_bytes_per_s) for address, rate in peers.items()}
        # A class is granted its own rate whatever its parent has left; so the rates add up to the parent's, and the
        # rest is borrowed, up to the ceiling.
        share = card_bytes_per_s / sum(ceilings.values())
        for minor, ceil in ceilings.items():
            lines += _leaf(device, parent="1:1", minor=minor, rate=ceil * share, ceil=ceil)
    return lines + [_to_class(root, address, minor) for address, minor in classes.items()]


def segment_bytes(rate_bytes_per_s: float) -> int:
    """Most that TCP may hand to an interface of that rate at once."""
    return round(max(2 * _FRAME_BYTES, min(_MAX_SEGMENT_BYTES, rate_bytes_per_s * _SEGMENT_S)))


def _htb(rate: float, ceil: float) -> str:
    burst, ceil_burst = (round(max(2 * _FRAME_BYTES, value * _BURST_S)) for value in (rate, ceil))
    return (
        f"htb rate {round(rate * 8)}bit ceil {round(ceil * 8)}bit "
        f"burst {burst} cburst {ceil_burst} quantum {_QUANTUM_BYTES}"
    )


def _leaf(device: str, *, parent: str, minor: int, rate: float, ceil: float) -> list[str]:
    limit = round(max(_MIN_QUEUE_BYTES, ceil * _QUEUE_S))
    return [
        f"class add dev {device} parent {parent} classid 1:{minor:x} {_htb(rate, ceil)}",
        f"qdisc add dev {device} parent 1:{minor:x} bfifo limit {limit}",
    ]


def _to_class(root: str, address: str, minor: int) -> str:
    return f"filter add {root} protocol ip prio 1 u32 match ip dst {address}/32 flowid 1:{minor:x}"
