"""The parts of a route, and the OpenAPI description of its errors."""

from __future__ import annotations

from typing import Any

from app.endpoint_type import Endpoint
from app.errors import MEDIA_TYPE, RequestError

# Path, method, endpoint and OpenAPI description.
Route = tuple[str, str, Endpoint, dict[str, Any]]

DEADLINE_PARAMETER = {
    "name": "X-Deadline-Ms",
    "in": "header",
    "required": False,
    "description": "milliseconds after which the request is refused instead of answered",
    "schema": {"type": "integer", "minimum": 1},
}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these statuses."""
    titles = {kind.status: kind.title for kind in RequestError.__subclasses__()}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {code: {"description": titles[code], "content": content} for code in codes}
