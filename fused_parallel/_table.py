"""Tables on the terminal: by rich where it is installed, else as aligned text."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print `rows` under `columns`; columns whose cells are all numbers are right-aligned."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(_plain(title, columns, cells, numeric), flush=True)
        return
    table = Table(title=title, title_justify="left")
    for name, right in zip(columns, numeric, strict=True):
        # A piped table keeps its lines whole; a terminal's is folded into the width there is.
        table.add_column(name, justify="right" if right else "left", no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in cells:
        table.add_row(*row)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 400
    Console(width=width, markup=False, highlight=False).print(table)
    sys.stdout.flush()


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _plain(title: str, columns: Sequence[str], cells: list[list[str]], numeric: list[bool]) -> str:
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [title] if title else []
    for row in [list(columns), ["-" * w for w in widths], *cells]:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
