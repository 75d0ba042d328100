"""A plan served on a virtual clock, with the server's own decisions and the cluster profile's times."""

from helixbench.reference_server.simulation.config import SimulationConfig
from helixbench.reference_server.simulation.simulator import SimulationResult, simulate
from helixbench.solver.problem.arrivals import Arrivals
from helixbench.solver.problem.traces import TracedRequest, read_trace
from helixbench.solver.simulation.events import load_events

__all__ = [
    "Arrivals",
    "SimulationConfig",
    "SimulationResult",
    "TracedRequest",
    "load_events",
    "read_trace",
    "simulate",
]
