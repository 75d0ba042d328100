"""How a served plan is adapted to what happens to its nodes; part of a job file, so it imports little."""

from __future__ import annotations

import msgspec

from helixbench.solver.scheduling.recover import REPLAY_MEMORY_BYTES


class AdaptOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a served plan is adapted to what happens.

    Attributes:
        reflows: weights follow what is measured.
        replans: where the nodes that are left do not cover the model with the layers that they hold, layers are moved.
        outage_s: how long requests wait where the nodes that are left do not cover the model.
        replay_memory_bytes: of the states that each node keeps of what it sent on.
        take_over: of agents that serve somebody else.
    """

    reflows: bool = True
    replans: bool = True
    outage_s: float = 60.0
    replay_memory_bytes: int = REPLAY_MEMORY_BYTES
    take_over: bool = False
