"""A plan served on a virtual clock, with the server's own decisions and the cluster profile's times."""

from .arrivals import Arrivals, TracedRequest, read_trace
from .events import load_events
from .simulator import NodeDiedError, SimulationConfig, SimulationResult, simulate

__all__ = [
    "Arrivals",
    "NodeDiedError",
    "SimulationConfig",
    "SimulationResult",
    "TracedRequest",
    "load_events",
    "read_trace",
    "simulate",
]
