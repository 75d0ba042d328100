"""The coordinator's process of ``profile net``: ``python -m helixbench.reference_server.jobs.net_driver JOB.json``."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from helixbench.profiler.cluster import COORDINATOR
from helixbench.profiler.network.records import NetworkProfile
from helixbench.progress import Reporter
from helixbench.records import provenance_now, save_record
from helixbench.reference_server.jobs.process import Interrupted, do_job
from helixbench.reference_server.profiling.net_config import NetConfig
from helixbench.reference_server.profiling.network import NetworkMeasurement
from helixbench.reference_server.testbed.testbed import say_ready
from helixbench.reference_server.wire.client import Agents
from helixbench.reference_server.wire.keys import load_key_file


class NetJob(msgspec.Struct, frozen=True, kw_only=True):
    """Measure the network of these agents into a file. ``command`` is the user's."""

    config: NetConfig
    addresses: dict[str, str]
    key_file: str
    output: str
    testbed: str
    command: str


def run_job(job: NetJob, reporter: Reporter) -> NetworkProfile:
    """Measure and save.

    Raises:
        InputError: an agent is not there.
    """
    interrupted = Interrupted(lambda: reporter.say("interrupted: finishing what runs; what was measured is kept"))
    key = load_key_file(Path(job.key_file))
    with Agents(job.addresses, key) as agents:
        agents.require_present()
        measured = NetworkMeasurement(
            agents,
            key,
            job.config,
            on_progress=reporter.update,
            is_interrupted=lambda: interrupted.is_set,
        ).run()
    profile = NetworkProfile(
        nodes=(COORDINATOR, *job.addresses),
        links=measured.links,
        cards=measured.cards,
        seconds=measured.seconds,
        testbed=job.testbed,
        cut_short=measured.cut_short,
        provenance=provenance_now(command=job.command),
    )
    save_record(Path(job.output), profile)
    return profile


def main(arguments: list[str]) -> int:
    """Do the job in that file; returns the exit code."""
    job = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=NetJob)
    return do_job(lambda reporter: run_job(job, reporter))


if __name__ == "__main__":
    say_ready()
    sys.exit(main(sys.argv[1:]))
