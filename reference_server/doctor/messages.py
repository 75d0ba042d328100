"""What the doctor asks agents."""

from __future__ import annotations

import msgspec

from helixbench.reference_server.doctor.facts import NodeFacts


class Examine(msgspec.Struct, frozen=True, tag="examine"):
    """Look at your machine."""


class Examined(msgspec.Struct, frozen=True, tag="examined"):
    """The agent's machine."""

    facts: NodeFacts


class ReadClock(msgspec.Struct, frozen=True, tag="read-clock"):
    """What time is it?"""


class ClockRead(msgspec.Struct, frozen=True, tag="clock-read"):
    """Seconds since 1970 by the agent's wall clock."""

    wall_s: float
