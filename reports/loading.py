"""Read the records that other packages write, whichever of them a file contains."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from helixbench.errors import InputError, MeasurementError
from helixbench.profiler.cluster import ClusterProfile
from helixbench.records import decode_record, digest, is_earlier, load_record
from helixbench.reference_server.run_log import RunLog
from helixbench.reports.verdict.client import ClientResult, load_client
from helixbench.solver.problem.plan import Plan

Record = ClusterProfile | Plan | RunLog
RecordT = TypeVar("RecordT", ClusterProfile, Plan, RunLog)

# schema tag -> type
TYPES: dict[str, type[Record]] = {str(kind.__struct_config__.tag): kind for kind in (ClusterProfile, Plan, RunLog)}


class _SchemaOnly(msgspec.Struct):
    schema: str


def load_any(path: Path) -> Record:
    """Read a cluster profile, a plan or a run.

    Raises:
        InputError: the file is neither, or not valid.
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


def load_output(path: Path, kind: type[RecordT]) -> RecordT:
    """Read a record that a command was asked to write.

    Raises:
        MeasurementError: the file is missing or empty, so that command produced nothing.
        InputError: it is damaged, or another kind of record.
    """
    if not path.exists():
        raise MeasurementError(f"{path}: no such file, so nothing was measured")
    raw = _read(path)
    if not raw.strip():
        raise MeasurementError(f"{path}: the file is empty, so nothing was measured")
    return decode_record(raw, kind, origin=str(path))


def is_plan(path: Path) -> bool:
    """Whether the file declares itself a plan; a folder, a missing or an unreadable file does not."""
    try:
        return TYPES.get(msgspec.json.decode(path.read_bytes(), type=_SchemaOnly).schema) is Plan
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False


def require_plan(record: Record, plan: Path, *, origin: Path) -> None:
    """Check that ``record`` is a run of the plan in that file.

    Raises:
        InputError: not a run, or a run of another plan.
    """
    if not isinstance(record, RunLog):
        raise InputError(f"{origin}: --plan applies to a run, and this is another record")
    if digest(record.plan) != digest(load_record(plan, Plan)):
        raise InputError(f"{origin}: a run of another plan than {plan}; name the plan that was run")


def client_of_options(
    record: Record, client: Path | None, benchmark: int | None, *, origin: Path
) -> ClientResult | None:
    """Another client's result, in the time of the devices that the run was served on; ``None`` where none is given.

    Raises:
        InputError: the record is no run, or the file no client's result.
    """
    if client is None:
        if benchmark is not None:
            raise InputError("--client-benchmark: goes with --client")
        return None
    if not isinstance(record, RunLog):
        raise InputError(f"{origin}: --client applies to a run, and this is another record")
    return load_client(client, benchmark=benchmark, time_scale=record.time_scale)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
