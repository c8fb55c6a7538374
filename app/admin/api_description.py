"""The public API's description, which a worker leaves for the admin port."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

OPENAPI_FILE = "openapi.json"


def leave_description(folder: Path, describe: Callable[[], dict[str, Any]]) -> None:
    """Write the OpenAPI document into a folder, unless another worker has done so.

    Args:
        folder: of the served copy of the bundle.
        describe: makes the document.
    """
    file = folder / OPENAPI_FILE
    if file.exists():
        return
    part = folder / f".{OPENAPI_FILE}.{secrets.token_hex(4)}"
    part.write_bytes(orjson.dumps(describe()))
    part.replace(file)
