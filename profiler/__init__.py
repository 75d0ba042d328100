"""What can this hardware do? Measures nodes and links into a ``ClusterProfile``."""

from helixbench.errors import HelixbenchError, InputError, MeasurementError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile, Coordinator, Device, Link, ModelFacts, Node
from helixbench.profiler.cost.model import BatchShape, StageCost

__all__ = [
    "COORDINATOR",
    "BatchShape",
    "ClusterProfile",
    "Coordinator",
    "Device",
    "HelixbenchError",
    "InputError",
    "Link",
    "MeasurementError",
    "ModelFacts",
    "Node",
    "StageCost",
]
