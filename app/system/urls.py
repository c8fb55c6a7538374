"""URLs that may contain a password: ambiguous ones are refused, and secrets are not shown.

A `?`, `#` or `/` in a password ends the host for some parsers and not for others. Part of the
password would then be taken for a host, port or path, and be printed. It must be percent-encoded.
"""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

HIDDEN = "***"
FILES = frozenset({"sqlite", "unix"})  # schemes with a local path, which may contain @
RULE = (
    "not an unambiguous URL; allowed: SCHEME://[USER:PASSWORD@]HOST[:PORT]/PATH "
    "with ?, #, / and @ in the password percent-encoded as %3F, %23, %2F and %40"
)


def split(url: str) -> SplitResult:
    """Parse a URL.

    Raises:
        ValueError: not a URL, or ambiguous; the message contains no part of it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its message may quote a part of the password
        raise ValueError(RULE) from None
    start = f"{parts.scheme}://{parts.netloc}"
    local = parts.scheme in FILES and not parts.netloc
    # An @ after the host would mean that the password began before it.
    if not parts.scheme or not url.lower().startswith(start.lower()):
        raise ValueError(RULE)
    if "@" in url[len(start) :] and not local:
        raise ValueError(RULE)
    return parts


def redacted(url: str) -> str:
    """`url` without user name, password, query and fragment.

    Text that is not a URL is shown as it is, and is `HIDDEN` where a password may be in it.
    """
    try:
        parts = split(url)
    except ValueError:
        return masked(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def masked(text: str) -> str:
    """`HIDDEN` for text that may be a URL with a password or a key in it; else `text`."""
    return HIDDEN if any(mark in text for mark in ("://", "@", "?", "#")) else text
