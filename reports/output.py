"""Output options of the commands of this package, and how they print documents and write files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixbench.options import note

if TYPE_CHECKING:
    from helixbench.reports.render.document import Document

HtmlFile = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write one self-contained page")]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="write a pull-request comment")]
ClientFile = Annotated[
    Path | None,
    typer.Option("--client", metavar="FILE", help="result of guidellm, vllm bench serve or aiperf for the same plan"),
]
ClientBenchmark = Annotated[
    int | None, typer.Option("--client-benchmark", min=1, help="which of the benchmarks in guidellm's file")
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="reject a run of another plan")]


def show(document: Document, *, to_stderr: bool = False) -> None:
    """Print a document once; in ASCII if the terminal is not UTF-8."""
    from rich.console import Console

    from helixbench.reports.formatting import to_ascii
    from helixbench.reports.render.terminal import draw

    stream = sys.stderr if to_stderr else sys.stdout
    console = Console(file=stream, highlight=False, soft_wrap=False)
    if console.encoding.lower().startswith("utf"):
        console.print(draw(document))
        return
    with console.capture() as captured:
        console.print(draw(document))
    stream.write(to_ascii(captured.get()))


def write(path: Path, text: str) -> None:
    """Write a file that an option asked for, and say so on stderr."""
    from helixbench.records import save_bytes

    save_bytes(path, text.encode())
    note(f"wrote {path}")
