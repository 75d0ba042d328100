"""Options that several commands share, each with one spelling and one help text; and how a command prints a record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.errors import InputError
from helixbench.units import parse_bytes

if TYPE_CHECKING:
    import msgspec

AsJson = Annotated[bool, typer.Option("--json", help="print the record on stdout, everything else on stderr")]
ModelDirectory = Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id")]
DeviceMemory = Annotated[
    str,
    typer.Option("--memory", help="for weights, workspace and KV cache, like 20GB or a number of bytes; default: all"),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="threads that compute on a CPU; default: one per core")
]
Cpus = Annotated[str, typer.Option("--cpus", help="cores to run on, like 0,2-3; default: any")]
PromptTokens = Annotated[int | None, typer.Option("--prompt-tokens", help="prompt length of every request")]
OutputTokens = Annotated[int | None, typer.Option("--output-tokens", help="output length of every request")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="CSV trace with ContextTokens and GeneratedTokens, instead of two lengths"),
]
TraceScale = Annotated[float, typer.Option("--trace-scale", help="multiply the lengths in the trace by this")]


def memory_of_option(text: str) -> float | None:
    """Bytes of ``DeviceMemory``; ``None`` where it is not given.

    Raises:
        InputError: not an amount of memory.
    """
    if not text:
        return None
    try:
        return float(text) if text.isdigit() else parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--memory {text}: {error}") from error


def print_record(record: msgspec.Struct) -> None:
    """A record as JSON on stdout."""
    from helixbench.records import encode_record

    sys.stdout.write(encode_record(record).decode())


def note(text: str) -> None:
    """A line about progress or results, on stderr."""
    print(text, file=sys.stderr)
