"""Run two commands in turn, each time a fresh process, and read one number out of what each of them says."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.records import decode_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Side
from helixbench.reports.verdict.integrity import check_run
from helixbench.reports.verdict.metrics import IS_HIGHER_BETTER, metrics_of

OUT = "{out}"
WALL_S = "wall_s"
_TAIL = 400


def measure_commands(commands: Mapping[Side, str], metric: str, *, timeout_s: float) -> Callable[[Side], float]:
    """What ``run_gate`` calls: runs that side's command once and returns its metric.

    A command tells its numbers as a JSON object: in the file that ``{out}`` stands for, or on the last line of its
    stdout. ``metric`` is a dotted path in it, a metric of a run log, or ``wall_s``, the time that the process took.

    Raises:
        InputError: a command that is none.
    """
    argvs = {side: split_command(command) for side, command in commands.items()}

    def measure(side: Side) -> float:
        return run_once(argvs[side], metric, timeout_s=timeout_s)

    return measure


def split_command(command: str) -> tuple[str, ...]:
    """A command line as a shell would split it; no shell runs it.

    Raises:
        InputError: empty, or an open quote.
    """
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise InputError(f"command {command!r}: {error}") from error
    if not argv:
        raise InputError("command: it is empty")
    return argv


def run_once(argv: tuple[str, ...], metric: str, *, timeout_s: float) -> float:
    """One fresh process, one number.

    Raises:
        InputError: there is no such program.
        MeasurementError: it failed, took too long, or did not say the metric.
    """
    name = shlex.join(argv)
    with tempfile.TemporaryDirectory(prefix="helixbench-gate-") as folder:
        out = Path(folder) / "out.json"
        began_s = time.perf_counter()
        try:
            done = subprocess.run(
                [argument.replace(OUT, str(out)) for argument in argv],
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except OSError as error:
            raise InputError(f"command {name}: cannot be run ({error.strerror or error})") from error
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"command {name}: not done after {timeout_s:g} s") from error
        wall_s = time.perf_counter() - began_s
        if done.returncode != 0:
            tail = done.stderr.decode(errors="replace").strip()[-_TAIL:]
            raise MeasurementError(f"command {name}: exit {done.returncode}: {tail}")
        if metric == WALL_S:
            return wall_s
        is_file = any(OUT in argument for argument in argv)
        if is_file and not out.exists():
            raise MeasurementError(f"command {name}: wrote nothing to {OUT}")
        raw = out.read_bytes() if is_file else _last_line(done.stdout)
    return read_metric(raw, metric, origin=name)


def read_metric(raw: bytes, metric: str, *, origin: str) -> float:
    """The metric of a run log, or the number at a dotted path of any JSON object.

    Raises:
        MeasurementError: it is not there, not a number, or the run contradicts itself.
    """
    try:
        found: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MeasurementError(f"{origin}: no JSON object in what it said ({error})") from error
    if isinstance(found, dict) and found.get("schema") == str(RunLog.__struct_config__.tag):
        return run_metric(decode_record(raw, RunLog, origin=origin), metric, origin=origin)
    for key in metric.split("."):
        if not isinstance(found, dict) or key not in found:
            raise MeasurementError(f"{origin}: it does not say {metric!r}")
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise MeasurementError(f"{origin}: {metric!r} is {found!r}, not a number")
    return float(found)


def run_metric(run: RunLog, metric: str, *, origin: str) -> float:
    """The metric of a whole and sound run.

    Raises:
        InputError: no such metric.
        MeasurementError: the run was cut short, contradicts itself, or has no request in its window.
    """
    if metric not in IS_HIGHER_BETTER:
        raise InputError(f"metric {metric!r}: a run has {', '.join(IS_HIGHER_BETTER)}")
    if run.cut_short:
        raise MeasurementError(f"{origin}: the run was cut short: {run.cut_short}")
    for check in check_run(run):
        if not check.is_passed:
            raise MeasurementError(f"{origin}: the record contradicts itself: {check.message}")
    values = metrics_of(run)
    if metric not in values:
        raise MeasurementError(f"{origin}: no request finished inside the window, so there is no {metric}")
    return values[metric]


def load_command(*, work: float) -> str:
    """The built-in load of ``gate calibrate``: the same arithmetic, ``work`` times as much of it."""
    return shlex.join([sys.executable, "-m", "helixbench.reports.gate.calibration_load", f"{work:.6g}"])


def _last_line(stdout: bytes) -> bytes:
    lines = stdout.strip().splitlines()
    return lines[-1] if lines else b""
