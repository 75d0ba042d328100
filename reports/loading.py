"""Open whichever record a file holds, by the schema that it names, and tell what each kind of record answers."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import RenderableType

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import decode_record, digest, is_earlier, load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.render.terminal import plan_summary, profile_summary, run_summary
from helixbench.reports.verdict.validate import validate
from helixbench.solver.problem.plan import Plan

Record = ClusterProfile | Plan | RunLog


class _SchemaOnly(msgspec.Struct):
    schema: str


# The schema named first in a file -> the type that reads it
TYPES: dict[str, type[Record]] = {str(kind.__struct_config__.tag): kind for kind in (ClusterProfile, Plan, RunLog)}


def load_any(path: Path) -> Record:
    """A cluster profile, a plan or a run.

    Raises:
        InputError: none of them, or not valid.
    """
    raw = _read(path)
    if not raw.strip():
        raise InputError(f"{path}: the file is empty; expected one of {', '.join(TYPES)}")
    try:
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}; expected a `schema` among {', '.join(TYPES)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a complete JSON file ({error}); make it again") from error
    for tag, kind in TYPES.items():
        if schema == tag or is_earlier(schema, kind):
            return decode_record(raw, kind, origin=str(path))
    raise InputError(f"{path}: schema {schema!r} is none of {', '.join(TYPES)}")


def load_run(path: Path) -> RunLog:
    """A run.

    Raises:
        MeasurementError: the file is not there or empty: whatever was to write it measured nothing.
        InputError: it is damaged or something else.
    """
    if not path.exists():
        raise MeasurementError(f"{path}: there is no such file, so nothing was measured")
    raw = _read(path)
    if not raw.strip():
        raise MeasurementError(f"{path}: the file is empty, so nothing was measured")
    return decode_record(raw, RunLog, origin=str(path))


def require_plan(record: Record, plan: Path, *, origin: Path) -> None:
    """Refuse a run of another plan than that file's.

    Raises:
        InputError: not a run, or of another plan.
    """
    if not isinstance(record, RunLog):
        raise InputError(f"{origin}: --plan goes with a run, this is another record")
    wanted = load_record(plan, Plan)
    if digest(record.plan) != digest(wanted):
        raise InputError(f"{origin}: a run of another plan than {plan}; run that plan, or name the one that was run")


def summary(record: Record) -> RenderableType:
    """The terminal summary of any record."""
    if isinstance(record, RunLog):
        return run_summary(record)
    return plan_summary(record) if isinstance(record, Plan) else profile_summary(record)


def answer(record: Record) -> msgspec.Struct:
    """What ``--json`` prints: the verdict of a run, any other record itself."""
    return validate(record) if isinstance(record, RunLog) else record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
