"""JSON Schemas of the records on disk, generated from their types."""

from __future__ import annotations

import json
from enum import StrEnum

import msgspec


class SchemaName(StrEnum):
    """Records that have a schema."""

    CLUSTER = "cluster"
    PLAN = "plan"
    RUN = "run"
    DEVICE = "device"


def json_schema(name: SchemaName) -> str:
    """The JSON Schema (2020-12) of a record."""
    from helixbench.profiler.cluster import ClusterProfile
    from helixbench.profiler.emulated_device import EmulatedDevice
    from helixbench.reference_server.run_log import RunLog
    from helixbench.solver.problem.plan import Plan

    types: dict[SchemaName, type[msgspec.Struct]] = {
        SchemaName.CLUSTER: ClusterProfile,
        SchemaName.PLAN: Plan,
        SchemaName.RUN: RunLog,
        SchemaName.DEVICE: EmulatedDevice,
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(types[name])}
    return json.dumps(schema, indent=1)
