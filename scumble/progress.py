"""How far long work has come: bars with the time left, or reports to another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm

Report = Callable[[str, int, int], None]
"""Takes what is done, how much of it is done, and how much there is."""

_report: ContextVar[Report | None] = ContextVar("report", default=None)

_showing: ContextVar[bool] = ContextVar("showing", default=False)


class _Reported(tqdm):  # type: ignore[type-arg]  # nothing is iterated
    """A bar that reports what it would show."""

    def __init__(self, report: Report, **options: Any) -> None:
        self._report = report
        super().__init__(**options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Report instead of writing to the terminal."""
        del msg, pos
        self._report(str(self.desc).removesuffix(": "), int(self.n), int(self.total or 0))


def bar(total: int, what: str, unit: str, *, shown: bool) -> tqdm[Any]:
    """A bar for `total` units of work.

    Args:
        total: units.
        what: is done.
        unit: its short name.
        shown: on the terminal; inside `reporting`, the bar reports instead.
    """
    report = _report.get()
    if report is not None:
        return _Reported(report, total=total, desc=what, unit=unit, mininterval=0.5)
    # On a terminal alone (None); bars of parts of the work go away when the part is done.
    off = None if shown or _showing.get() else True
    return tqdm(total=total, desc=what, unit=unit, disable=off, leave=shown)


@contextmanager
def showing(shown: bool) -> Iterator[None]:
    """Show the bars of the parts of the work that is done in the meantime, too."""
    token = _showing.set(shown)
    try:
        yield
    finally:
        _showing.reset(token)


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Let the bars that are made in the meantime report instead of being shown."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


def to_file(path: Path) -> Report:
    """A report that another process reads with `from_file`."""

    def report(what: str, done: int, total: int) -> None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(f"{done} {total} {what}")
        part.replace(path)

    return report


def from_file(path: Path) -> tuple[str, int, int] | None:
    """The last report in a file; None if there is none yet."""
    try:
        done, total, what = path.read_text().split(" ", 2)
    except FileNotFoundError:
        return None
    return what, int(done), int(total)
