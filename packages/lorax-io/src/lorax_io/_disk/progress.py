"""A progress bar that appears only if the work takes long."""

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
    """Enables or disables progress bars inside this block."""
    token = _wanted.set(wanted and _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def track(items: Collection[Item], label: str) -> Iterator[Item]:
    """Yields the items, with a progress bar on a terminal once a second has passed.

    Without `rich` there is no bar.
    """
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
