"""Records on disk: one JSON object per file, its schema named first, read strictly and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from helixbench.errors import InputError

RecordT = TypeVar("RecordT", bound=msgspec.Struct)


SPACE_BYTES = 16 << 20
"""Free space that there has to be for a record; that of a run of 100 000 requests fits."""

_OTHER_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class _AnyRecord(msgspec.Struct):
    schema: str


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """When, where and from what a record was made.

    ``inputs`` maps the role of each file that it was made from (``"cluster"``, ``"plan"``) to that file's digest.
    """

    created: str = ""
    host: str = ""
    command: str = ""
    versions: dict[str, str] = {}
    inputs: dict[str, str] = {}
    note: str = ""
    source: str = ""


def command_line() -> str:
    """The command that this process was started with."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def provenance_now(
    *, inputs: dict[str, str] | None = None, command: str = "", note: str = "", source: str = ""
) -> Provenance:
    """Provenance of a record made now, by ``command`` or else by this process."""
    from importlib import metadata  # slow to import, and a node's process needs none of it

    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for distribution in ("helixbench", "torch", "transformers", "pulp", "highspy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[distribution] = metadata.version(distribution)
    commit = source_commit(Path(__file__).resolve().parents[1])
    if commit:
        versions["commit"] = commit
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=platform.node(),
        command=command or command_line(),
        versions=versions,
        inputs=inputs or {},
        note=note,
        source=source,
    )


def source_commit(folder: Path) -> str:
    """Commit of the checkout in that folder; empty where it is none, as for an installed package."""
    git = folder / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="ascii").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text(encoding="ascii").strip()
        packed = (git / "packed-refs").read_text(encoding="ascii").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError):
        return ""


def encode_record(record: msgspec.Struct) -> bytes:
    """The record as indented JSON, fields in the order of their declaration."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def digest(record: msgspec.Struct) -> str:
    """Digest of a record's content, independent of the file that holds it."""
    return "sha256:" + hashlib.sha256(msgspec.json.encode(record)).hexdigest()


def decode_record(raw: bytes, record_type: type[RecordT], *, origin: str) -> RecordT:
    """Typed record from JSON bytes.

    Args:
        raw: the JSON text.
        record_type: a struct tagged by ``schema``.
        origin: the file (or other source) to name in errors.

    Raises:
        InputError: not JSON, another schema, an unknown or missing field, a wrong type or a value out of range.
    """
    if not raw.strip():
        raise InputError(f"{origin}: the file is empty; expected {_schema_of(record_type)}")
    try:
        schema = msgspec.json.decode(raw, type=_AnyRecord).schema  # a lone struct's tag may be missing, a record's not
        if is_earlier(schema, record_type):
            return _decode_earlier(raw, record_type, schema=schema, origin=origin)
        return msgspec.json.decode(raw, type=record_type)
    except msgspec.ValidationError as error:
        raise InputError(f"{origin}: {error}; expected {_schema_of(record_type)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{origin}: not a complete JSON file ({error}); make it again") from error


def is_earlier(schema: str, record_type: type[msgspec.Struct]) -> bool:
    """Whether the schema is an earlier version of the record's."""
    kind, _, number = str(record_type.__struct_config__.tag).rpartition("/")
    earlier_kind, _, earlier_number = schema.rpartition("/")
    return kind == earlier_kind and earlier_number.isdigit() and int(earlier_number) < int(number)


def _decode_earlier(raw: bytes, record_type: type[RecordT], *, schema: str, origin: str) -> RecordT:
    """A record of an earlier version that its type still reads (``reads``), if all of its fields still exist.

    Raises:
        InputError: it cannot be read; the message names the command that makes it again (``remade_by``).
    """
    problem = f"{origin}: a {schema} record of an earlier version; this one reads {record_type.__struct_config__.tag}"
    remedy = f"make it again with `{getattr(record_type, 'remade_by', 'helixbench')}`"
    if schema not in getattr(record_type, "reads", ()):
        raise InputError(f"{problem}: {remedy}")
    tree = msgspec.json.decode(raw)
    try:
        return msgspec.convert(tree | {"schema": record_type.__struct_config__.tag}, record_type)
    except msgspec.ValidationError as error:
        raise InputError(f"{problem} ({error}): {remedy}") from error


def load_record(path: Path, record_type: type[RecordT]) -> RecordT:
    """Read and validate one record; raises as ``decode_record`` does."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return decode_record(raw, record_type, origin=str(path))


def save_record(path: Path, record: msgspec.Struct) -> None:
    """Write a record whole or not at all: to a temporary file beside it, synced, then renamed over it."""
    save_bytes(path, encode_record(record))


def save_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: the folder cannot be made or written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_be_written(path, error) from error
    finally:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote ``path``."""
    for other in path.parent.iterdir():
        owner = other.name.removeprefix(f".{path.name}.").partition(".")[0]
        if not (other.name.startswith(f".{path.name}.") and owner.isdigit()):
            continue
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (OSError, OverflowError):
            continue  # another user's, and alive


def save_measurement(path: Path, record: msgspec.Struct) -> None:
    """Write a record that took a measurement; where that fails, to another folder or else to stdout.

    Raises:
        InputError: it could not be written there; the message says where it is instead.
    """
    try:
        save_record(path, record)
    except InputError as error:
        content = encode_record(record)
        for folder in (*map(Path, _OTHER_FOLDERS), Path.home()):
            other = folder / f"{path.stem}-{os.getpid()}{path.suffix}"
            try:
                save_bytes(other, content)
            except InputError:
                continue
            raise InputError(f"{error}; the record of what was measured is in {other}") from error
        sys.stdout.write(content.decode())
        sys.stdout.flush()
        raise InputError(f"{error}; the record of what was measured is on stdout") from error


def require_writable(path: Path) -> None:
    """Check that ``save_bytes`` can write there, before the work whose result goes there, and that there is space.

    Raises:
        InputError: the folder cannot be made or written, or the path is a folder itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, SPACE_BYTES)
    except OSError as error:
        raise _cannot_be_written(path, error) from error


def _cannot_be_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place")


def _schema_of(record_type: type[msgspec.Struct]) -> str:
    return f"a {record_type.__struct_config__.tag} record"


def require_unique(names: Sequence[str], *, field: str) -> None:
    """Refuse a list with a duplicate name.

    Raises:
        ValueError: with the field and the duplicate name.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{field}: duplicate name {name!r}")
        seen.add(name)
