"""Progress bars on stderr, by rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch.distributed as dist


@contextlib.contextmanager
def progress_bar(show: bool, text: str, total: int, unit: str = "") -> Iterator[Callable[[int], object]]:
    """A bar on rank 0, in `unit`s; yields the function that advances it. The unit "GB" counts bytes."""
    if not show or (dist.is_initialized() and dist.get_rank() != 0):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counted = (DownloadColumn(),) if unit == "GB" else (MofNCompleteColumn(), TextColumn(unit))
    columns = TextColumn(text), BarColumn(), *counted, TimeRemainingColumn()
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
