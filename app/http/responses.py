"""Small JSON responses."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from starlette.responses import Response


def json_response(document: object, status: int = 200) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(document), status, media_type="application/json")


def health(status: str, stale: Sequence[str] = ()) -> Response:
    """The response of `/readyz`: 200 if the status is `ready`, else 503."""
    document = {"status": status, "stale": stale} if stale else {"status": status}
    return json_response(document, 200 if status == "ready" else 503)
