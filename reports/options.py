"""What the commands of this package share: options of one meaning, and how they print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import msgspec
    from rich.console import RenderableType

AsJson = Annotated[bool, typer.Option("--json", help="print the record on stdout, everything else on stderr")]
MarkdownFile = Annotated[Path | None, typer.Option(metavar="FILE", help="write a pull-request comment")]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="refuse a run of another plan")]


def show(renderable: RenderableType, *, to_stderr: bool = False) -> None:
    """Print once, no live redraw; in ASCII where the terminal cannot show more."""
    from rich.console import Console

    from helixbench.reports.render.text import to_ascii

    stream = sys.stderr if to_stderr else sys.stdout
    console = Console(file=stream, highlight=False, soft_wrap=False)
    if console.encoding.lower().startswith("utf"):
        console.print(renderable)
        return
    with console.capture() as captured:
        console.print(renderable)
    stream.write(to_ascii(captured.get()))


def print_record(record: msgspec.Struct) -> None:
    """A record as JSON on stdout."""
    from helixbench.records import encode_record

    sys.stdout.write(encode_record(record).decode())


def note(text: str) -> None:
    """Progress, on stderr."""
    typer.echo(text, err=True)
