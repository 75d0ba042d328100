"""Draw documents as Markdown comments: the verdict first, details folded, within GitHub's limits."""

from __future__ import annotations

import html
from collections.abc import Iterator

from helixbench.reports.render.document import Cell, Document, Section, Styled

# GitHub cuts a comment at 65 536 characters.
MAX_CHARACTERS = 60_000


def markdown(document: Document, *, max_characters: int = MAX_CHARACTERS) -> str:
    """As many parts of the document as fit, in order; a last line says if some were left out."""
    kept: list[str] = []
    length = 0
    for part in filter(None, _parts(document)):
        length += len(part) + 2
        if length > max_characters:
            kept.append("_Truncated: the rest does not fit into a comment._")
            break
        kept.append(part)
    return "\n\n".join(kept) + "\n"


def _parts(document: Document) -> Iterator[str]:
    word = document.verdict.text if document.verdict is not None else document.title
    yield f"### helixbench {document.kind}: {escape(word)}"
    yield escape(document.statement)
    yield "" if document.verdict is None else escape(document.title)
    yield "\n".join(escape(line) for line in document.lines)
    yield from (_section(section) for section in document.sections if not section.is_detail)
    yield _bullets(tuple(dict.fromkeys(filter(None, document.notes))))
    yield from (_section(section) for section in document.sections if section.is_detail)
    made = document.provenance
    yield f"<sub>{escape(made.command)} · {escape(made.created)}</sub>" if made.command else ""


def _section(section: Section) -> str:
    heading = f"{section.title}: {section.about}" if section.about else section.title
    body = "\n\n".join(filter(None, [_table(section), _bullets(section.lines)]))
    if not body:
        return ""
    if section.is_detail:
        return f"<details><summary>{html.escape(heading)}</summary>\n\n{body}\n\n</details>"
    return f"**{escape(heading)}**\n\n{body}"


def _table(section: Section) -> str:
    used = [i for i in section.used_columns() if not section.columns[i].startswith("=")]
    if not used:
        return ""
    names = [section.columns[i] for i in used]
    head = "| " + " | ".join(name.removeprefix(">") for name in names) + " |"
    rule = "|" + "|".join("---:" if name.startswith(">") else "---" for name in names) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(_cell(row[i]) for i in used) + " |" for row in section.rows)])


def _cell(cell: Cell) -> str:
    return f"**{escape(cell.text)}**" if isinstance(cell, Styled) and cell.text else escape(str(cell))


def _bullets(lines: tuple[str, ...]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def escape(text: str) -> str:
    """Text from a record, made unable to break a table or to act as markup."""
    for char in ("\\", "|", "<", "[", "`", "@"):
        text = text.replace(char, {"<": "&lt;", "@": "@\u200b"}.get(char, "\\" + char))
    return " ".join(text.split())
