"""What can this hardware do? Measures nodes and links into a ``ClusterProfile``."""

from .cluster_profile import COORDINATOR, ClusterProfile, Coordinator, Device, Link, ModelFacts, Node
from .cost import BatchShape, StageCost
from .errors import HelixbenchError, InputError, MeasurementError

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
