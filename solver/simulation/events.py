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


class LinkChanges(_Timed, frozen=True, kw_only=True, tag="link"):
    """From then on the link ``src -> dst`` carries ``factor`` times its bandwidth in the profile."""

    src: str
    dst: str
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"factor: need more than 0, got {self.factor}")


class NodeDies(_Timed, frozen=True, kw_only=True, tag="die"):
    """The node is gone, with all that it held."""

    node: str


class NodeJoins(_Timed, frozen=True, kw_only=True, tag="join"):
    """A node that the plan does not use offers itself."""

    node: str


Event: TypeAlias = NodeSlows | LinkChanges | NodeDies | NodeJoins


def name_of(event: Event) -> str:
    """The event in a few words, for people."""
    what = f"{event.src} -> {event.dst}" if isinstance(event, LinkChanges) else event.node
    return f"{event.__struct_config__.tag} {what} at {event.at_s:g} s"


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
        raise InputError(f"{path}: {error}; kinds are slow, link, die and join") from error
    except (UnicodeDecodeError, msgspec.DecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: neither TOML nor JSON ({error})") from error
    return tuple(sorted(events, key=lambda event: event.at_s))
