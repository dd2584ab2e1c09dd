"""A progress bar for work that takes long, and silence for work that does not."""

import contextlib
import contextvars
import math
import sys
import time
from collections.abc import Collection, Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
_PATIENCE = 1.0  # seconds before a bar appears


_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("bars are wanted", default=True)


@contextlib.contextmanager
def bars(wanted: bool) -> Generator[None]:
    """A block with bars or without."""
    token = _wanted.set(wanted and _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def track(items: Collection[Item], label: str) -> Iterator[Item]:
    """The items; on a terminal with a bar, once they have taken a second, where `rich` is there."""
    if not (_wanted.get() and sys.stderr.isatty()):
        yield from items
        return
    begin, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - begin > _PATIENCE:
                with contextlib.suppress(ImportError):
                    bar, task = _start(label, len(items))
                begin = math.inf if bar is None else begin
            if bar is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _start(label: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    bar.start()
    return bar, task
