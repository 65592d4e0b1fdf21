"""Tables as columns of text, drawn on a terminal, in HTML, in Markdown, from one description.

A narrow terminal loses its least important columns first; a number is never wrapped or cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

KEEP = 0
"""Importance of columns that are never dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column.

    Attributes:
        header: its title, with the unit.
        cells: one per row.
        text: words, set flush left; numbers are set flush right.
        drop: when space is short, columns with the highest value go first; ``KEEP`` stays.
        wraps: words that may take several lines, at least ``min_width`` wide.
        code: set in a monospaced font where there is a choice.
        details: what a page adds in small print below each cell.
    """

    header: str
    cells: tuple[str, ...]
    text: bool = False
    drop: int = KEEP
    wraps: bool = False
    code: bool = False
    details: tuple[str, ...] = ()
    min_width: int = 24

    @property
    def width(self) -> int:
        """Characters that it needs."""
        full = max([len(self.header), *(len(cell) for cell in self.cells)])
        return min(full, max(self.min_width, len(self.header))) if self.wraps else full


def check_columns(columns: Sequence[Column]) -> int:
    """Return the number of rows; all columns have as many."""
    lengths = {len(column.cells) for column in columns}
    assert len(lengths) == 1, f"columns of different lengths: {lengths}"
    return lengths.pop()


def fitting(columns: Sequence[Column], width: int, *, gap: int = 2) -> list[Column]:
    """The columns that fit into ``width`` characters, the least important dropped; later ones first where equal."""
    kept = list(columns)
    while sum(column.width for column in kept) + gap * (len(kept) - 1) > width:
        droppable = [column for column in kept if column.drop != KEEP]
        if not droppable:
            break
        worst = max(column.drop for column in droppable)
        kept.remove(next(column for column in reversed(droppable) if column.drop == worst))
    return kept


def terminal_table(
    columns: Sequence[Column], width: int, *, title: str = "", caption: str = "", strong: Sequence[int] = ()
) -> Table:
    """A rich table not wider than ``width`` characters. Rows in ``strong`` are set bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None,
        caption=Text(caption) if caption else None,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    shown = fitting(columns, width)
    for column in shown:
        table.add_column(
            Text(column.header),
            justify="left" if column.text else "right",
            no_wrap=not column.wraps,
            overflow="fold" if column.wraps else "crop",
            min_width=column.width if not column.wraps else None,
        )
    for row in range(check_columns(columns)):
        style = "bold" if row in strong else None
        table.add_row(*(Text(column.cells[row]) for column in shown), style=style)
    return table


def html_table(columns: Sequence[Column], *, caption: str = "", strong: Sequence[int] = ()) -> str:
    """An HTML table in a box that scrolls sideways on a narrow page. Rows in ``strong`` are marked."""
    head = "".join(f"<th scope=col{_align(column)}>{escape(column.header)}</th>" for column in columns)
    rows = []
    for row in range(check_columns(columns)):
        cells = "".join(f"<td{_align(column)}>{_cell(column, row)}</td>" for column in columns)
        mark = " class=chosen" if row in strong else ""
        rows.append(f"<tr{mark}>{cells}</tr>")
    text = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(rows)
    return (
        f"<div class=scroll tabindex=0><table>{text}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _align(column: Column) -> str:
    if not column.text:
        return " class=number"
    return " class=wraps" if column.wraps else " class=word"


def _cell(column: Column, row: int) -> str:
    cell = escape(column.cells[row])
    cell = f"<code>{cell}</code>" if column.code else cell
    if not column.details:
        return cell
    detail = column.details[row]
    return f"{cell}<small{'' if ' ' in detail else ' class=slug'}>{escape(detail)}</small>"


def markdown_table(columns: Sequence[Column]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---" if column.text else "---:" for column in columns]
    rows = [
        line([f"`{c.cells[row]}`" if c.code else c.cells[row] for c in columns])
        for row in range(check_columns(columns))
    ]
    return "\n".join([line([column.header for column in columns]), line(rule), *rows]) + "\n"
