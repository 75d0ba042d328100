"""Options that several commands share, each with one spelling and one help text; and how a command prints a record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    typer.Option("--trace", help="trace of requests, plain or gzip, instead of two lengths; formats: --trace-format"),
]
TraceFormat = Annotated[
    Literal["auto", "azure", "burstgpt", "mooncake", "sharegpt"],
    typer.Option("--trace-format", help="format of the trace; auto: by the names of its columns"),
]
TraceScale = Annotated[float, typer.Option("--trace-scale", help="multiply the lengths in the trace by this")]
TraceTokenizer = Annotated[
    Path | None,
    typer.Option("--trace-tokenizer", help="directory or tokenizer.json of a model, for a trace of texts (sharegpt)"),
]
Rate = Annotated[float | None, typer.Option("--rate", help="open loop: requests/s on average")]
Burstiness = Annotated[
    float,
    typer.Option("--burstiness", help="with --rate: shape of the gamma-distributed gaps; 1 is Poisson, below 1 bursty"),
]
Replay = Annotated[bool, typer.Option("--replay", help="open loop: requests arrive at the times of --trace")]
Speedup = Annotated[float, typer.Option("--speedup", help="with --replay: this many times as fast")]
MaxTtftS = Annotated[float | None, typer.Option("--max-ttft-s", help="goodput: longest time to the first token")]
MaxTpotS = Annotated[float | None, typer.Option("--max-tpot-s", help="goodput: longest time per output token")]


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
