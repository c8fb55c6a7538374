"""The `traceparent` request header: which trace a request belongs to.

Source: W3C Recommendation *Trace Context*, sections 3.2 and 4. It is a request header, and the
recommendation has none for answers, so it is not echoed; answers have `X-Request-ID`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Lower case only. Later versions may add fields behind another dash.
FORM = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def read_traceparent(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The header without what later versions may add; None if it is missing, twice or malformed."""
    found = [value for name, value in headers if name == b"traceparent"]
    if len(found) != 1:
        return None
    match = FORM.fullmatch(found[0])
    if match is None:
        return None
    version, trace, parent, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    if not trace.strip(b"0") or not parent.strip(b"0"):
        return None
    return b"-".join((b"00", trace, parent, flags)).decode()
