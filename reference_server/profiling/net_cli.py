"""``helixbench profile net``: measure links and network cards, of a testbed or of agents that already run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from helixbench.errors import InputError, MeasurementError
from helixbench.reference_server.doctor.cli import parse_agents

if TYPE_CHECKING:
    from helixbench.profiler.network.records import NetworkProfile
    from helixbench.reference_server.profiling.net_config import NetConfig
    from helixbench.reference_server.testbed.spec import TestbedSpec

INTERRUPTED = 130


def profile_net(
    testbed: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it
        typer.Option("--testbed", help="Testbed TOML. Default: the demo's four nodes."),
    ] = None,
    agent: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--agent", help="NAME=HOST:PORT of an agent that runs already; once for each, with --key."),
    ] = None,
    key: Annotated[Optional[Path], typer.Option("--key", help="The key that those agents were started with.")] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Write the record there.")] = None,  # noqa: UP045
    seconds: Annotated[float, typer.Option(min=1, help="Of bandwidth for each pair, whole seconds.")] = 2.0,
    one_pair_at_a_time: Annotated[
        bool, typer.Option("--one-pair-at-a-time", help="No rounds: where pairs share more than network cards.")
    ] = False,
    cards: Annotated[bool, typer.Option(help="Measure all links of a node at once, too.")] = True,
    messages: Annotated[bool, typer.Option(help="Time messages of several sizes, too.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print the record on stdout.")] = False,
) -> None:
    """Measure all links and network cards. Ctrl-C keeps what was measured by then."""
    from rich.console import Console

    from helixbench.profiler.network.records import NetworkProfile
    from helixbench.records import load_record
    from helixbench.reference_server.profiling.net_config import FULL_CURVE_BYTES, NetConfig
    from helixbench.reference_server.profiling.net_show import show_network

    spec = _spec(testbed, agent or [], key)
    config = NetConfig(
        seconds=seconds,
        message_bytes=FULL_CURVE_BYTES if messages else (),
        one_pair_at_a_time=one_pair_at_a_time,
        measures_cards=cards,
    )
    with tempfile.TemporaryDirectory(prefix="helixbench-") as folder:
        record = output.resolve() if output is not None else Path(folder) / "network.json"
        logs = record.parent / "logs"
        code = _drive(spec, config, record=record, log_dir=logs)
        if code != 0:
            raise typer.Exit(code)
        measured = load_record(record, NetworkProfile)
        if json_:
            sys.stdout.write(record.read_text(encoding="utf-8"))
    show_network(measured, Console(stderr=json_))
    if output is not None:
        print(f"{output} written", file=sys.stderr)
    _end(measured)


def _end(measured: NetworkProfile) -> None:
    """Exit code: 0 where every link has its number.

    Raises:
        MeasurementError: an error ended the measurement, or a link could not be measured.
    """
    if measured.cut_short.startswith("interrupted"):
        raise typer.Exit(INTERRUPTED)
    if measured.cut_short:
        raise MeasurementError(measured.cut_short)
    missing = [f"{link.src} -> {link.dst}" for link in measured.links if link.bandwidth_bytes_per_s is None]
    if missing:
        raise MeasurementError(f"not measured: {', '.join(missing)}")


def _spec(testbed: Path | None, agents: list[str], key: Path | None) -> TestbedSpec:
    from importlib import resources

    from helixbench.reference_server.testbed.spec import load_testbed, testbed_from_tree

    if not agents:
        if key is not None:
            raise InputError("--key: belongs to --agent NAME=HOST:PORT; a testbed file names its key itself")
        return load_testbed(testbed or Path(str(resources.files("helixbench.reference_server.testbed") / "demo.toml")))
    if testbed is not None or key is None:
        raise InputError("--agent: give --key FILE with it, and no --testbed")
    nodes = [{"name": name, "address": address} for name, address in parse_agents(agents).items()]
    return testbed_from_tree({"node": nodes, "key": str(key.resolve())}, origin="--agent", folder=Path.cwd())


def _drive(spec: TestbedSpec, config: NetConfig, *, record: Path, log_dir: Path) -> int:
    """Start the testbed and measure in its coordinator's place; the driver's exit code."""
    import msgspec

    from helixbench.records import command_line
    from helixbench.reference_server.jobs.net_driver import NetJob
    from helixbench.reference_server.testbed.testbed import start_testbed

    with start_testbed(spec, log_dir=log_dir) as bed, tempfile.TemporaryDirectory(prefix="helixbench-") as folder:
        print(f"  testbed: {bed.description}", file=sys.stderr)
        job = NetJob(
            config=config,
            addresses=dict(bed.addresses),
            key_file=str(bed.key_file.resolve()),
            output=str(record),
            testbed=bed.description,
            command=command_line(),
        )
        job_file = Path(folder) / "job.json"
        job_file.write_bytes(msgspec.json.encode(job))
        code = bed.run_driver(
            [sys.executable, "-m", "helixbench.reference_server.jobs.net_driver", str(job_file)], says_when_ready=True
        )
        if code != 0:
            bed.check()
        return code
