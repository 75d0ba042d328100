"""Faults of a cluster, from a file: TOML or JSON with a list ``event``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeAlias

import msgspec

from helixbench.errors import InputError


class _Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    at_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.at_s < float("inf"):
            raise ValueError(f"at_s: need seconds >= 0, got {self.at_s}")


class NodeSlows(_Timed, frozen=True, kw_only=True, tag="slow"):
    """From then on iterations of the node take ``factor`` times as long as in the profile; 1 is healthy again."""

    node: str
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"factor: need more than 0, got {self.factor}")


class NodeFreezes(_Timed, frozen=True, kw_only=True, tag="freeze"):
    """The node does nothing from then on, and keeps all that it holds."""

    node: str


class NodeResumes(_Timed, frozen=True, kw_only=True, tag="resume"):
    """A frozen node goes on where it stopped."""

    node: str


class NodeDies(_Timed, frozen=True, kw_only=True, tag="kill"):
    """The node is gone, with all that it held."""

    node: str


class NodeJoins(_Timed, frozen=True, kw_only=True, tag="join"):
    """A node is there, empty: one that died before, or one that the plan does not use."""

    node: str


class NodeDrains(_Timed, frozen=True, kw_only=True, tag="drain"):
    """The node takes no new requests from then on, so that it can be removed."""

    node: str


class _OfLink(_Timed, frozen=True, kw_only=True):
    src: str
    dst: str


class LinkChanges(_OfLink, frozen=True, kw_only=True, tag="rate"):
    """From then on the link ``src -> dst`` carries ``factor`` times its bandwidth in the profile."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"factor: need more than 0, got {self.factor}")


class LinkCut(_OfLink, frozen=True, kw_only=True, tag="cut"):
    """The link ``src -> dst`` carries nothing from then on."""


class LinkHeals(_OfLink, frozen=True, kw_only=True, tag="heal"):
    """The link ``src -> dst`` carries again what it did."""


NodeEvent: TypeAlias = NodeSlows | NodeFreezes | NodeResumes | NodeDies | NodeJoins | NodeDrains
LinkEvent: TypeAlias = LinkChanges | LinkCut | LinkHeals
Event: TypeAlias = NodeEvent | LinkEvent

KINDS = "slow, freeze, resume, kill, join, drain, rate, cut and heal"


def place_of(event: Event) -> tuple[str, str]:
    """The node whose event it is, and an empty text; of a link, its two ends."""
    return (event.src, event.dst) if isinstance(event, LinkEvent) else (event.node, "")


def what_of(event: Event) -> str:
    """What happens, in a few words, without its time."""
    factor = f" x {event.factor:g}" if isinstance(event, NodeSlows | LinkChanges) else ""
    return f"{event.__struct_config__.tag} {' -> '.join(filter(None, place_of(event)))}{factor}"


def name_of(event: Event) -> str:
    """The event in a few words, for people."""
    return f"{what_of(event)} at {event.at_s:g} s"


class _EventFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    event: tuple[Event, ...]


def load_events(path: Path) -> tuple[Event, ...]:
    """The events of a file, by time.

    Raises:
        InputError: not such a file, an unknown kind or field, or a value out of range.
    """
    try:
        raw = path.read_text(encoding="utf-8")
        tree = msgspec.json.decode(raw) if path.suffix == ".json" else tomllib.loads(raw)
        events = msgspec.convert(tree, _EventFile).event
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}; kinds are {KINDS}") from error
    except (UnicodeDecodeError, msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: neither TOML nor JSON ({error})") from error
    return tuple(sorted(events, key=lambda event: event.at_s))
