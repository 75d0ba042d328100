"""Draw documents on a terminal: 80 columns, legible without colour, printed once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from helixbench.reports.render.document import Cell, Document, Section, Styled


def draw(document: Document) -> RenderableType:
    """The document, its verdict near the end, where it stays visible on a scrolling terminal."""
    return Group(
        Text.assemble((document.kind.upper(), "bold"), "  ", document.title),
        *(Text(f"  {line}") for line in document.lines),
        *_parts(document),
    )


def _parts(document: Document) -> Iterator[RenderableType]:
    for section in document.sections:
        if section.rows or section.lines:
            yield _block(section.title, section.about, _table(section), *map(Text, section.lines))
    if document.verdict is not None:
        yield _block("Verdict", Text(document.verdict.text.upper(), style=document.verdict.style), document.statement)
    yield from _facts("Notes", document.notes)
    made = document.provenance
    yield from _facts("Provenance", (" on ".join(filter(None, [made.created, made.host])), made.command))


def _block(title: str, about: str | Text, *body: RenderableType | None) -> RenderableType:
    heading = Text.assemble((title.upper(), "bold"), "  " if about else "", about)
    return Group("", heading, *(Padding(part, (0, 0, 0, 2), expand=False) for part in body if part is not None))


def _facts(title: str, lines: Iterable[str]) -> Iterator[RenderableType]:
    body = [Text(line) for line in dict.fromkeys(lines) if line]
    if body:
        yield _block(title, "", *body)


def _table(section: Section) -> Table | None:
    """Columns without rules. Long text cells are folded, never cut; numbers and bars are never broken."""
    used = section.used_columns()
    if not used:
        return None
    names = [section.columns[i] for i in used]
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(name.strip(">=") for name in names))
    for name in names:
        grid.add_column(
            name.lstrip(">="),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
            no_wrap=name.startswith((">", "=")),
            header_style="italic",
        )
    for row in section.rows:
        grid.add_row(*(_text(row[i]) for i in used))
    return grid


def _text(cell: Cell) -> Text:
    return Text(cell.text, style=cell.style) if isinstance(cell, Styled) else Text(cell)
