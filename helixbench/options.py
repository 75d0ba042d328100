"""Options that several commands share, each with one spelling and one help text; and how a command prints a record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import msgspec

AsJson = Annotated[bool, typer.Option("--json", help="print the record on stdout, everything else on stderr")]
ModelDirectory = Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id")]
PromptTokens = Annotated[int | None, typer.Option("--prompt-tokens", help="prompt length of every request")]
OutputTokens = Annotated[int | None, typer.Option("--output-tokens", help="output length of every request")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="CSV trace with ContextTokens and GeneratedTokens, instead of two lengths"),
]
TraceScale = Annotated[float, typer.Option("--trace-scale", help="multiply the lengths in the trace by this")]


def print_record(record: msgspec.Struct) -> None:
    """A record as JSON on stdout."""
    from helixbench.records import encode_record

    sys.stdout.write(encode_record(record).decode())


def note(text: str) -> None:
    """A line about progress or results, on stderr."""
    print(text, file=sys.stderr)
