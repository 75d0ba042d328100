"""Run one command in a fresh process and read one number from its output: what ``gate pairs`` repeats in turn."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.records import decode_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.compare.regression import Side
from helixbench.reports.verdict.run_metrics import metric_of

OUT = "{out}"
WALL_S = "wall_s"
_TAIL = 400


def measure_commands(commands: Mapping[Side, str], metric: str, *, timeout_s: float) -> Callable[[Side], float]:
    """A function that runs one side's command once and returns its metric.

    A command reports a JSON object: in the file that replaces ``{out}`` in its arguments, or on the last line of its
    stdout. ``metric`` is a metric of a run, a dotted path in any other object, or ``wall_s``, the duration of the
    process.

    Raises:
        InputError: a command is empty or has an unclosed quote.
    """
    argvs = {side: split_command(command) for side, command in commands.items()}

    def measure(side: Side) -> float:
        return run_once(argvs[side], metric, timeout_s=timeout_s)

    return measure


def split_command(command: str) -> tuple[str, ...]:
    """Split a command line as a shell would; no shell runs it.

    Raises:
        InputError: it is empty or has an unclosed quote.
    """
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise InputError(f"command {command!r}: {error}") from error
    if not argv:
        raise InputError("the command is empty")
    return argv


def run_once(argv: tuple[str, ...], metric: str, *, timeout_s: float) -> float:
    """The metric of one fresh process.

    Raises:
        InputError: the program does not exist.
        MeasurementError: it failed, timed out, or did not report the metric.
    """
    name = shlex.join(argv)
    with tempfile.TemporaryDirectory(prefix="helixbench-gate-") as folder:
        out = Path(folder) / "out.json"
        command = [argument.replace(OUT, str(out)) for argument in argv]
        began_s = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        except OSError as error:
            raise InputError(f"command {name}: cannot be run ({error.strerror or error})") from error
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"command {name}: timed out after {timeout_s:g} s") from error
        wall_s = time.perf_counter() - began_s
        if done.returncode != 0:
            tail = done.stderr.decode(errors="replace").strip()[-_TAIL:]
            raise MeasurementError(f"command {name}: exit {done.returncode}: {tail}")
        if metric == WALL_S:
            return wall_s
        if any(OUT in argument for argument in argv):
            if not out.exists():
                raise MeasurementError(f"command {name}: did not write {OUT}")
            raw = out.read_bytes()
        else:
            raw = next(reversed(done.stdout.strip().splitlines()), b"")
    return read_metric(raw, metric, origin=name)


def read_metric(raw: bytes, metric: str, *, origin: str) -> float:
    """The metric of a run, or the number at a dotted path of any other JSON object.

    Raises:
        MeasurementError: it is missing, not a number, or the run contradicts itself.
    """
    try:
        found: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MeasurementError(f"{origin}: its output is not a JSON object ({error})") from error
    if isinstance(found, dict) and found.get("schema") == str(RunLog.__struct_config__.tag):
        return metric_of(decode_record(raw, RunLog, origin=origin), metric, origin=origin)
    for key in metric.split("."):
        if not isinstance(found, dict) or key not in found:
            raise MeasurementError(f"{origin}: its output has no {metric!r}")
        found = found[key]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise MeasurementError(f"{origin}: {metric!r} is {found!r}, not a number")
    return float(found)
