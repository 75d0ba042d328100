"""The job file of a driver: one JSON object, read by ``python -m helixbench.reference_server.jobs.driver``.

The driver is the process that acts as the coordinator, in the coordinator's namespace of a testbed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import msgspec

from helixbench.reference_server.coordinator.bench_load import CLOSED_LOOP
from helixbench.reference_server.coordinator.live_events import Rig
from helixbench.reference_server.coordinator.options import AdaptOptions
from helixbench.reference_server.http.options import HttpOptions
from helixbench.reference_server.profiling.config import ProfileConfig
from helixbench.reference_server.run_log import LatencyLimits
from helixbench.reference_server.testbed.emulation import Timing
from helixbench.solver.problem.arrivals import Arrivals
from helixbench.solver.problem.traces import TracedRequest
from helixbench.solver.problem.workload import Workload
from helixbench.solver.scheduling.work import Routing
from helixbench.solver.simulation.events import Event


class ProfileJob(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """Profile the cluster into a file."""

    config: ProfileConfig


class _PlanJob(msgspec.Struct, frozen=True, kw_only=True):
    """What running a plan takes. With ``allow_stale`` also where the profile was made on something else."""

    plan: Path
    model: str
    addresses: dict[str, str]
    key_file: Path
    testbed: str
    timing: Timing = Timing()
    allow_stale: bool = False
    adapt: AdaptOptions = AdaptOptions()


class BenchJob(_PlanJob, frozen=True, kw_only=True, tag="bench"):
    """Run a plan under load and write the run log.

    The load is as in ``BenchConfig``; times are the devices'. ``command`` is the user's. ``limits`` are those of
    goodput. ``events`` happen to ``rig``. ``history`` is where to write what clients saw.
    """

    command: str
    output: Path
    workload: Workload
    concurrency: int | None
    routing: Routing
    seed: int
    num_requests: int | None = None
    duration_s: float | None = None
    arrivals: Arrivals = CLOSED_LOOP
    trace: tuple[TracedRequest, ...] = ()
    warmup_s: float = 0.0
    limits: LatencyLimits | None = None
    events: tuple[Event, ...] = ()
    rig: Rig = Rig()
    history: Path | None = None


class ServeJob(_PlanJob, frozen=True, kw_only=True, tag="serve"):
    """Serve a plan over HTTP on a socket that is already listening, given by its file descriptor."""

    socket_fd: int
    url: str
    http: HttpOptions
    ready_file: Path | None = None


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag_field="schema", tag="helixbench.serving/1"):
    """Where a plan is served: the content of ``serve --ready-file``, written once requests are answered."""

    url: str
    model: str


Job: TypeAlias = ProfileJob | BenchJob | ServeJob


def encode_job(job: Job) -> bytes:
    """The job as JSON."""
    return msgspec.json.encode(job, enc_hook=str)  # of the types in a job only Path is not msgspec's own


def decode_job(raw: bytes) -> Job:
    """The job from JSON."""
    job: Job = msgspec.json.decode(raw, type=Job, dec_hook=lambda type_, value: type_(value))
    return job
