"""What a route is made of, and what the OpenAPI document says of its refusals."""

from __future__ import annotations

from typing import Any

from app.endpoint import Endpoint
from app.errors import MEDIA_TYPE, RequestError

# Path, method, endpoint, and what the OpenAPI document says of it.
Route = tuple[str, str, Endpoint, dict[str, Any]]

DEADLINE_PARAMETER = {
    "name": "X-Deadline-Ms",
    "in": "header",
    "required": False,
    "description": "milliseconds after which the request is not worth an inference any more",
    "schema": {"type": "integer", "minimum": 1},
}


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The document's entries of these statuses."""
    titles = {kind.status: kind.title for kind in RequestError.__subclasses__()}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {code: {"description": titles[code], "content": content} for code in codes}
