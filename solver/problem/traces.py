"""Traces of real requests, in the formats in which they are published: when each arrived, and how long it was.

Formats are told apart by the names of columns and keys: ``azure`` (CSV: ``TIMESTAMP``, ``ContextTokens``,
``GeneratedTokens``), ``burstgpt`` (CSV: ``Timestamp``, ``Request tokens``, ``Response tokens``), ``mooncake`` (JSON
lines: ``timestamp``, ``input_length``, ``output_length``, ``hash_ids``) and ``sharegpt`` (JSON: ``conversations``).

Sources: Azure LLM inference traces 2023 and 2024 (Patel et al., ISCA 2024); BurstGPT (Wang et al., KDD 2025);
Mooncake (Qin et al., FAST 2025).
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from helixbench.errors import InputError

TraceFormat = Literal["azure", "burstgpt", "mooncake", "sharegpt"]
AnyTraceFormat = Literal["auto", "azure", "burstgpt", "mooncake", "sharegpt"]

MAX_TOKENS = 100_000_000
"""A length beyond this is a fault of the file: no model has such a context."""

_BLOCK_TOKENS = 512
"""Prompt tokens of one ``hash_ids`` entry of a mooncake trace."""

_COLUMNS: dict[TraceFormat, tuple[str, str]] = {
    "azure": ("ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Request tokens", "Response tokens"),
    "mooncake": ("input_length", "output_length"),
}
"""Format -> the names of prompt and output length."""

_TIME = re.compile(r"\s*(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d+))?\s*(Z|[+-]\d\d:?\d\d)?\s*", re.ASCII)
_REPLIES = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard", "model"})


class TracedRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request of a trace: seconds since the trace's first one, its lengths, and the session that it belongs to."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session: str = ""


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Requests in the order of their arrival.

    Attributes:
        source: the file's name, and the factor on its lengths.
        requests: at least one.
        has_arrivals: whether the file says when they arrived; else all ``arrival_s`` are 0.
        notes: what a reader of results should know: requests that were left out, reuse that is not modelled.
    """

    source: str
    requests: tuple[TracedRequest, ...]
    has_arrivals: bool
    notes: tuple[str, ...] = ()


def read_trace(
    path: Path, *, kind: AnyTraceFormat = "auto", scale: float = 1.0, tokenizer: Path | None = None
) -> Trace:
    """Read a trace, plain or gzip-compressed, with or without a byte order mark.

    Args:
        path: the file.
        kind: its format; ``auto`` to tell by its columns.
        scale: every length is multiplied by this and rounded, to at least 1.
        tokenizer: of a model (its directory or ``tokenizer.json``); counts the tokens of a trace of texts.

    Raises:
        InputError: unreadable, of no known format, without requests, or a row with an impossible length or time.
    """
    if not 0 < scale < math.inf:
        raise InputError(f"--trace-scale {scale}: need a finite number of more than 0")
    content = _text(path)
    try:
        found, rows = _rows_of(content, path, kind)
        if found == "sharegpt":
            return _from_texts(rows, path, scale=scale, tokenizer=tokenizer)
        return _from_lengths(rows, path, found, scale=scale)
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a CSV trace ({error})") from error


def trace_of_options(
    path: Path | None,
    *,
    kind: AnyTraceFormat,
    scale: float,
    tokenizer: Path | None,
    prompt_tokens: int | None,
    output_tokens: int | None,
) -> Trace | None:
    """The trace that the shared command-line options name; ``None`` where they name none.

    Raises:
        InputError: as ``read_trace``, or lengths are given as well.
    """
    if path is None:
        return None
    if prompt_tokens is not None or output_tokens is not None:
        raise InputError("--trace and --prompt-tokens/--output-tokens: give one of them")
    return read_trace(path, kind=kind, scale=scale, tokenizer=tokenizer)


class _Row(NamedTuple):
    where: str  # file and line
    fields: Mapping[str, object]


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a trace in UTF-8, plain or gzip ({error})") from error


def _rows_of(content: str, path: Path, kind: AnyTraceFormat) -> tuple[TraceFormat, Iterator[_Row]]:
    """The format and the rows of the file."""
    is_json = content.lstrip()[:1] in ("[", "{")
    rows = _json_rows(content, path) if is_json else _csv_rows(content, path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: no requests in it")
    names = set(first.fields)
    known = {one for one, columns in _COLUMNS.items() if names.issuperset(columns)}
    if "conversations" in names:
        known.add("sharegpt")
    if kind == "auto" and not known:
        listed = "; ".join(f"{one} has {' and '.join(columns)}" for one, columns in _COLUMNS.items())
        raise InputError(
            f"{path}: no trace format has the columns {', '.join(sorted(names)) or '(none)'}: {listed}; "
            "sharegpt has conversations"
        )
    if kind not in ("auto", *known):
        need = "conversations" if kind == "auto" or kind == "sharegpt" else " and ".join(_COLUMNS[kind])
        raise InputError(f"{path}: a {kind} trace has {need}; this file has {', '.join(sorted(names))}")
    found: TraceFormat = sorted(known)[0] if kind == "auto" else kind
    return found, itertools.chain([first], rows)


def _csv_rows(content: str, path: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(content, newline=""), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        yield _Row(f"{path}:{reader.line_num}", {name: value for name, value in row.items() if name is not None})


def _json_rows(content: str, path: Path) -> Iterator[_Row]:
    if content.lstrip().startswith("["):
        trees = _decoded(content, str(path))
        assert isinstance(trees, list), "it begins as an array"
        for number, tree in enumerate(trees):
            yield _json_row(tree, f"{path}[{number}]")
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _json_row(_decoded(line, where), where)


def _decoded(text: str, where: str) -> object:
    try:
        return msgspec.json.decode(text.strip())
    except msgspec.DecodeError as error:
        raise InputError(f"{where}: not a complete JSON document ({error})") from error


def _json_row(tree: object, where: str) -> _Row:
    if not isinstance(tree, dict):
        raise InputError(f"{where}: need a JSON object for each request, got {str(tree)[:40]}")
    return _Row(where, tree)


# --- formats that have lengths


def _from_lengths(rows: Iterable[_Row], path: Path, kind: TraceFormat, *, scale: float) -> Trace:
    prompt_name, output_name = _COLUMNS[kind]
    time_name, time_ns = _TIMES[kind]
    requests: list[tuple[int, TracedRequest]] = []  # nanoseconds, and the request without its arrival
    num_empty = 0
    blocks: set[object] = set()
    num_blocks = num_known = 0
    has_arrivals = True
    for where, fields in rows:
        prompt = _length(fields.get(prompt_name), f"{where}: {prompt_name}")
        output = _length(fields.get(output_name), f"{where}: {output_name}")
        has_arrivals = has_arrivals and time_name in fields
        at_ns = time_ns(fields.get(time_name), f"{where}: {time_name}") if has_arrivals else 0
        if not prompt or not output:
            num_empty += 1
            continue
        hashes = fields.get("hash_ids")
        if isinstance(hashes, list):
            num_blocks += len(hashes)
            num_known += sum(one in blocks for one in hashes)
            blocks.update(hashes)
        session = fields.get("Session ID") or fields.get("session_id")
        lengths = _scaled(prompt, output, scale, where=where)
        requests.append((at_ns, TracedRequest(0.0, *lengths, "" if session is None else str(session))))
    notes = [] if not num_empty else [f"trace {path.name}: {num_empty} requests without a prompt or an output left out"]
    if num_known:
        notes.append(
            f"trace {path.name}: prefix reuse is not modelled; {num_known / num_blocks:.0%} of the prompts' blocks of "
            f"{_BLOCK_TOKENS} tokens had come before"
        )
    return _trace(path, requests, has_arrivals=has_arrivals, scale=scale, notes=notes)


def _length(given: object, what: str) -> int:
    """Tokens.

    Raises:
        InputError: no length that a request can have.
    """
    try:
        if given is None or isinstance(given, bool):
            raise ValueError("missing")
        number = float(str(given).strip())
        if not number.is_integer():
            raise ValueError("not a whole number")
    except (ValueError, OverflowError) as error:
        raise InputError(f"{what} is {given!r}: need a whole number of tokens") from error
    if not 0 <= number <= MAX_TOKENS:
        raise InputError(f"{what} is {given!r}: need 0 to {MAX_TOKENS} tokens")
    return int(number)


def _scaled(prompt: int, output: int, scale: float, *, where: str) -> tuple[int, int]:
    if max(prompt, output) * scale > MAX_TOKENS:
        raise InputError(f"{where}: {prompt} and {output} tokens x --trace-scale {scale:g} are too many")
    return max(1, round(prompt * scale)), max(1, round(output * scale))


def _clock_ns(given: object, what: str) -> int:
    """Nanoseconds since 1970 of a date and time, in UTC where it has no offset."""
    match = _TIME.fullmatch(given) if isinstance(given, str) else None
    try:
        if match is None:
            raise ValueError("another form")
        whole, fraction, offset = match.groups()
        moment = datetime.fromisoformat(whole + (offset or "").replace("Z", "+00:00"))
    except ValueError as error:
        raise InputError(
            f"{what} is {given!r}: need a time like 2023-11-16 18:15:46.68 or 2024-05-10 00:00:00.01+00:00"
        ) from error
    seconds = round((moment if offset else moment.replace(tzinfo=UTC)).timestamp())
    return seconds * 10**9 + int((fraction or "").ljust(9, "0")[:9])


def _number_ns(unit_ns: int) -> Callable[[object, str], int]:
    def time_ns(given: object, what: str) -> int:
        """Nanoseconds of a number of units."""
        try:
            number = float(str(given).strip())
            if not 0 <= number < 1e12 or isinstance(given, bool):
                raise ValueError("out of range")
        except ValueError as error:
            raise InputError(f"{what} is {given!r}: need a number, at least 0") from error
        return round(number * unit_ns)

    return time_ns


_TIMES: dict[TraceFormat, tuple[str, Callable[[object, str], int]]] = {
    "azure": ("TIMESTAMP", _clock_ns),
    "burstgpt": ("Timestamp", _number_ns(10**9)),
    "mooncake": ("timestamp", _number_ns(10**6)),
}
"""Format -> the name of the arrival time, and how to read it."""


def _trace(
    path: Path,
    requests: list[tuple[int, TracedRequest]],
    *,
    has_arrivals: bool,
    scale: float,
    notes: Iterable[str] = (),
) -> Trace:
    if not requests:
        raise InputError(f"{path}: no request with a prompt and an output in it")
    requests.sort(key=lambda one: one[0])
    first_ns = requests[0][0]
    return Trace(
        source=path.name if scale == 1 else f"{path.name} x {scale:g}",
        requests=tuple(
            TracedRequest((at_ns - first_ns) / 1e9 if has_arrivals else 0.0, *msgspec.structs.astuple(request)[1:])
            for at_ns, request in requests
        ),
        has_arrivals=has_arrivals,
        notes=tuple(notes),
    )


# --- conversations, which have texts


def _from_texts(rows: Iterable[_Row], path: Path, *, scale: float, tokenizer: Path | None) -> Trace:
    """Every reply is a request, with all turns before it as its prompt, as a chat client sends them."""
    if tokenizer is None:
        raise InputError(f"{path}: has texts, not lengths: give --trace-tokenizer, the directory of a model")
    conversations = [_turns(fields.get("conversations"), where) for where, fields in rows]
    texts = [text for turns in conversations for _, text in turns]
    counts = iter(_token_counts(texts, tokenizer))
    requests, num_empty, num_continued = [], 0, 0
    for number, turns in enumerate(conversations):
        before, replies = 0, 0
        for is_reply, _ in turns:
            count = next(counts)
            if is_reply and before and count:
                lengths = _scaled(before, count, scale, where=f"{path}[{number}]")
                requests.append((0, TracedRequest(0.0, *lengths, str(number))))
                num_continued += replies > 0
                replies += 1
            elif is_reply:
                num_empty += 1
            before += count
    notes = [f"trace {path.name}: {num_empty} replies without text or prompt left out"] if num_empty else []
    if num_continued:
        notes.append(
            f"trace {path.name}: prefix reuse is not modelled; {num_continued} of {len(requests)} requests continue a "
            "conversation"
        )
    return _trace(path, requests, has_arrivals=False, scale=scale, notes=notes)


def _turns(given: object, where: str) -> list[tuple[bool, str]]:
    """Whether each turn is a reply, and its text."""
    turns = []
    for number, turn in enumerate(given if isinstance(given, list) else [None]):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise InputError(f"{where}: conversations[{number}]: need an object with the texts `from` and `value`")
        turns.append((speaker in _REPLIES, text))
    return turns


def _token_counts(texts: list[str], tokenizer: Path) -> list[int]:
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise InputError(f"--trace-tokenizer {file}: cannot be read as a tokenizer ({error})") from error
    return [len(one.ids) for one in loaded.encode_batch(texts, add_special_tokens=False)]
