"""Scumble: defenses, client, attacks, evaluation and training of image classifiers.

`import scumble` itself loads nothing; a name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scumble.client.errors import BadAnswer, BadImage, ClientError, Refused, Unreachable
    from scumble.client.http_client import AsyncClient, Client
    from scumble.client.wire import Answer, Choice, InputShape, Limits, ModelInfo, Prediction

__all__ = [
    "Answer",
    "AsyncClient",
    "BadAnswer",
    "BadImage",
    "Choice",
    "Client",
    "ClientError",
    "InputShape",
    "Limits",
    "ModelInfo",
    "Prediction",
    "Refused",
    "Unreachable",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# module -> the public names that live there
_HOMES = {
    "scumble.client.http_client": ("AsyncClient", "Client"),
    "scumble.client.errors": ("BadAnswer", "BadImage", "ClientError", "Refused", "Unreachable"),
    "scumble.client.wire": ("Answer", "Choice", "InputShape", "Limits", "ModelInfo", "Prediction"),
}
