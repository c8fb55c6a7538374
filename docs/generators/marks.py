"""Puts what a generator writes between its marks in a page that people write."""

from __future__ import annotations


def between(page: str, begin: str, made: str, end: str) -> str:
    """The page with `made` between the marks `begin` and `end`, all else as it was.

    Raises:
        ValueError: the marks are not there, or not in this order.
    """
    head, first, rest = page.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the page lacks the marks {begin.strip()!r} and {end.strip()!r}")
    return f"{head}{begin}{made}{end}{tail}"
