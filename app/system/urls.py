"""URLs that may hold a password: refused where parsers differ, and shown without what is secret.

A `?`, `#` or `/` in a password ends the host for one parser and not for another, so that a part of
the password is taken for a host, a port or a path, and is printed. It has to be percent-encoded.
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

HIDDEN = "***"
FILES = frozenset({"sqlite", "unix"})  # schemes with a path of this machine, which may have an @
RULE = (
    "not a URL that every parser reads alike; allowed: SCHEME://[USER:PASSWORD@]HOST[:PORT]/PATH "
    "with ?, #, / and @ of a password percent-encoded, as %3F, %23, %2F and %40"
)


def split(url: str) -> SplitResult:
    """The parts of a URL.

    Raises:
        ValueError: it is none, or parsers could differ; the message has no part of it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its message quotes what was taken for a port
        raise ValueError(RULE) from None
    start = f"{parts.scheme}://{parts.netloc}"
    local = parts.scheme in FILES and not parts.netloc
    # Behind the host an @ would be the end of a password that began before it.
    if not parts.scheme or not url.lower().startswith(start.lower()):
        raise ValueError(RULE)
    if "@" in url[len(start) :] and not local:
        raise ValueError(RULE)
    return parts


def redacted(url: str) -> str:
    """`url` without a user's name and password, query and fragment; `HIDDEN` if it is none."""
    try:
        parts = split(url)
    except ValueError:
        return HIDDEN
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
