"""Errors of the client.

ClientError
├─ BadImage     the image cannot be sent: not an image, or an unsupported format
├─ Unreachable  no answer came: connection refused, timed out or lost
├─ Refused      the service refused; has its `status`, `detail` and `problem`
└─ BadAnswer    the answer does not follow the contract
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """A call failed; the message says where and why."""


class BadImage(ClientError, ValueError):
    """The image cannot be sent; no request was made."""


class Unreachable(ClientError):
    """No answer came."""


class Refused(ClientError):
    """The service refused the request.

    Attributes:
        url: what was asked.
        status: HTTP status, 400 to 599.
        detail: the service's sentence about this request.
        problem: all members of its `application/problem+json` answer, empty if it sent none.
    """

    def __init__(self, url: str, status: int, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(url, status, detail, problem)
        self.url = url
        self.status = status
        self.detail = detail
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.url} answered {self.status}: {self.detail}"


class BadAnswer(ClientError):
    """An answer came that does not follow the contract."""
