"""The tc commands that limit what leaves a network interface. Pure: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping

# A frame takes about this long on its link: the shaper lets the first frame after a pause through at full speed, and a
# message of one frame would cost nothing. Frames of fast links are jumbo frames.
_FRAME_S = 0.001
_MIN_MTU_BYTES = 576
MAX_MTU_BYTES = 9000
_ETHERNET_BYTES = 14
_HEADER_BYTES = 52  # of a frame's MTU: IPv4, TCP, and TCP's time stamps
# A class may send this long at full speed after a pause: covers a late timer, and is less than a message takes.
_BURST_S = 0.0005
# How much a queue holds: a switch with this much buffer loses nothing unless several nodes send to one at once.
_QUEUE_S = 0.1
_MIN_QUEUE_BYTES = 512 * 1024
# TCP hands down up to 64 KiB at once, and a class sends it as one: held to this long, but one frame at least.
_SEGMENT_S = 0.001
_MAX_SEGMENT_BYTES = 65_536
# What a class may send before the next one's turn. Given, for the kernel's guess from the rate draws a warning.
_QUANTUM_BYTES = 60_000
_OTHERS_CLASS = 0x10
_FIRST_PEER_CLASS = 0x11


def mtu_bytes(rate_bytes_per_s: float | None) -> int:
    """The MTU of a link or card of that rate; of one without a limit where it is ``None``."""
    if rate_bytes_per_s is None:
        return MAX_MTU_BYTES
    return round(max(_MIN_MTU_BYTES, min(MAX_MTU_BYTES, rate_bytes_per_s * _FRAME_S)))


def frames_at_once(rate_bytes_per_s: float) -> int:
    """Most frames that TCP may hand to an interface of that rate as one."""
    held = min(_MAX_SEGMENT_BYTES, rate_bytes_per_s * _SEGMENT_S)
    return max(1, int(held / mtu_bytes(rate_bytes_per_s)))


def egress_commands(
    device: str, *, card_bytes_per_s: float | None, peer_bytes_per_s: Mapping[str, float] | None = None
) -> list[str]:
    """Lines for ``tc -batch`` that limit what leaves ``device``; none where nothing is limited.

    Args:
        device: the interface, not shaped so far.
        card_bytes_per_s: payload limit over all that leaves it; ``None`` for none.
        peer_bytes_per_s: IPv4 address -> payload limit of what goes there.
    """
    card_bytes_per_s = None if card_bytes_per_s is None else _with_headers(card_bytes_per_s)
    peers = {address: _with_headers(rate) for address, rate in (peer_bytes_per_s or {}).items()}
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


def _with_headers(rate_bytes_per_s: float) -> float:
    """Bytes/s on the wire where TCP carries that many."""
    mtu = mtu_bytes(rate_bytes_per_s)
    return rate_bytes_per_s * (mtu + _ETHERNET_BYTES) / (mtu - _HEADER_BYTES)


def _htb(rate: float, ceil: float) -> str:
    return (
        f"htb rate {round(rate * 8)}bit ceil {round(ceil * 8)}bit "
        f"burst {round(rate * _BURST_S)} cburst {round(ceil * _BURST_S)} quantum {_QUANTUM_BYTES}"
    )


def _leaf(device: str, *, parent: str, minor: int, rate: float, ceil: float) -> list[str]:
    limit = round(max(_MIN_QUEUE_BYTES, ceil * _QUEUE_S))
    return [
        f"class add dev {device} parent {parent} classid 1:{minor:x} {_htb(rate, ceil)}",
        f"qdisc add dev {device} parent 1:{minor:x} bfifo limit {limit}",
    ]


def _to_class(root: str, address: str, minor: int) -> str:
    return f"filter add {root} protocol ip prio 1 u32 match ip dst {address}/32 flowid 1:{minor:x}"
