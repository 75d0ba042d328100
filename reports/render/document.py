"""A summary before it is drawn: headings, tables and text. Terminal and Markdown draw the same documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from helixbench.records import Provenance

GOOD, BAD, CAUTION, BOLD = "bold green", "bold red", "bold yellow", "bold"


class Styled(NamedTuple):
    """Text with a style of rich, which Markdown shows in bold."""

    text: str
    style: str


Cell: TypeAlias = str | Styled
Row: TypeAlias = tuple[Cell, ...]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A heading, a table and lines below it. One without rows and lines is not drawn.

    A column that starts with ``>`` is right-aligned, one that starts with ``=`` contains bars. ``is_detail``: folded
    in Markdown.
    """

    title: str
    about: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    lines: tuple[str, ...] = ()
    is_detail: bool = True

    def used_columns(self) -> list[int]:
        """Columns that have any content."""
        return [i for i in range(len(self.columns)) if any(text_of(row[i]) for row in self.rows)]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """A summary: a title, sections, and the verdict if there is one."""

    kind: str
    title: str
    lines: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    verdict: Styled | None = None
    statement: str = ""
    notes: tuple[str, ...] = ()
    provenance: Provenance = Provenance()


def section(
    title: str,
    about: str,
    columns: Sequence[str],
    rows: Iterable[Row],
    *,
    most: int | None = None,
    lines: Iterable[str] = (),
    is_detail: bool = True,
) -> Section:
    """A section with at most ``most`` rows, the first ones; a line counts the others."""
    listed = tuple(rows)
    hidden = len(listed) - most if most is not None else 0
    more = [f"… and {hidden} more {title.lower()}"] if hidden > 0 else []
    return Section(
        title=title,
        about=about,
        columns=tuple(columns),
        rows=listed[:most],
        lines=(*more, *lines),
        is_detail=is_detail,
    )


def text_of(cell: Cell) -> str:
    """The cell without its style."""
    return cell.text if isinstance(cell, Styled) else cell
