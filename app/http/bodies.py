"""A request's body -> the encoded images in it: raw, multipart or base64 in JSON.

One reader per content type in `READERS`; each checks the framing and the number of images, none
decodes one. Where the content type does not say which one it is, the first bytes of the body do.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from functools import partial
from reprlib import Repr

import orjson
from starlette.types import Message, Receive

from app.errors import (
    BadFraming,
    ClientGone,
    TooLarge,
    Unprocessable,
    UnsupportedType,
)
from app.http.forms import read_form
from app.inference.deadline import Deadline
from app.inference.executor import BoundedExecutor
from app.inference.image_formats import FORMATS, SIGNATURE

# A request's headers with lower-case names, a `dict` of the ASGI pairs: looking a few up in
# Starlette's Headers takes longer than decoding a small image.
Headers = Mapping[bytes, bytes]
Reader = Callable[[Headers, bytes, int], list[bytes]]

# Sent by clients that do not know the type of the body; curl sends the last one by default.
UNSPECIFIC = frozenset(
    ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
)
OBJECT = re.compile(rb"[ \t\r\n]{0,100}\{")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DATA_URL = re.compile(rb"data:[^,]{0,100};base64,")
URL_SAFE = bytes.maketrans(b"-_", b"+/")

# Bodies up to this size are parsed on the event loop, which takes some milliseconds at most.
INLINE_BYTES = 65_536
# Limits of a JSON document. The parser holds the interpreter lock, so it blocks the event loop even
# on a thread: 40 ms at most.
MOST_VALUES = 400_000
LIST_VALUES = 4  # numbers that take as long to parse as one list or object
MOST_STRINGS = 10_000  # including names of members

PIECE = 1 << 20  # base64 digits decoded at once

_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict = 2, 6, 3
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 40


async def read_images(
    headers: Headers,
    receive: Receive,
    *,
    max_bytes: int,
    max_images: int,
    executor: BoundedExecutor,
    deadline: Deadline,
) -> list[bytes]:
    """The encoded images of a request, at least one.

    Args:
        headers: of the request.
        receive: gives the body.
        max_bytes: of the body.
        max_images: in it.
        executor: parses bodies that would hold the event loop.
        deadline: of the request.

    Raises:
        UnsupportedType: an unsupported content type, or a compressed body.
        TooLarge: over `max_bytes` or `max_images`.
        BadFraming: the body does not match the content type.
        Unprocessable: the body has no image.
        Unavailable, TooLate, ClientGone: as `executor` raises them.
    """
    declared = headers.get(b"content-type", b"").decode("latin-1")
    content_type = declared.partition(";")[0].strip().lower()
    reader = READERS.get(content_type)
    if reader is None and content_type not in UNSPECIFIC and not content_type.startswith("image/"):
        raise _unsupported(content_type)
    refuse_encoding(headers)
    body = await read_body(headers, receive, max_bytes)
    if reader is None:
        reader = _recognised(body)
        if reader is None:
            raise _unsupported(content_type, f" and a body that starts with {body[:8]!r}")
    if len(body) <= INLINE_BYTES or reader is raw:
        images = reader(headers, body, max_images)
    else:
        task = partial(reader, headers, body, max_images)
        (images,) = await executor([task], len(body), deadline)
    if len(images) > max_images:
        raise TooLarge(f"request has {len(images)} images; allowed: {max_images}")
    if not all(images):
        raise Unprocessable("an image is empty (0 bytes)" if body else "body is empty")
    return images


def small_number(text: str) -> int | None:
    """A whole number of up to 15 digits, else None; `int` raises on thousands of digits."""
    return int(text) if len(text) <= 15 and text.isascii() and text.isdecimal() else None


def refuse_encoding(headers: Headers) -> None:
    """Refuse compressed bodies, which could expand to any size.

    Raises:
        UnsupportedType: the body is compressed.
    """
    declared = headers.get(b"content-encoding")
    if declared is None:
        return
    encoding = declared.strip().lower()
    if encoding not in (b"identity", b""):
        name = encoding[:40].decode("latin-1")
        raise UnsupportedType(f"unsupported Content-Encoding {name!r}; allowed: identity")


async def read_body(headers: Headers, receive: Receive, max_bytes: int) -> bytes:
    """The whole body; at most `max_bytes` of it are held.

    Raises:
        TooLarge: more than `max_bytes`, declared or sent.
        ClientGone: the client disconnected before the end of the body.
    """
    _declared(headers, max_bytes)
    body, more = _piece(await receive(), 0, max_bytes)
    if not more:  # nearly always
        return body
    whole = bytearray(body)  # a list of small pieces would take many times their size
    while more:
        chunk, more = _piece(await receive(), len(whole), max_bytes)
        whole += chunk
    return bytes(whole)


async def read_buffer(headers: Headers, receive: Receive, max_bytes: int) -> bytes | bytearray:
    """The whole body; in a writable buffer if its length is declared.

    An array over that buffer can be passed to an engine without another copy.

    Raises:
        TooLarge, ClientGone: as in `read_body`.
        BadFraming: the body is shorter than declared.
    """
    declared = _declared(headers, max_bytes)
    if not declared:
        return await read_body(headers, receive, max_bytes)
    body, more = bytearray(), True
    while more:
        chunk, more = _piece(await receive(), len(body), declared)
        body += chunk  # grows by an eighth beyond what it holds: no copy for each piece
    if len(body) < declared:
        raise BadFraming(f"body has {len(body)} bytes, but Content-Length is {declared}")
    return body


def _declared(headers: Headers, max_bytes: int) -> int:
    """The declared length of the body; 0 if none is declared."""
    declared = small_number(headers.get(b"content-length", b"0").decode("latin-1")) or 0
    if declared > max_bytes:
        raise TooLarge(f"body has {declared} bytes; allowed: {max_bytes}")
    return declared


def _piece(message: Message, size: int, max_bytes: int) -> tuple[bytes, bool]:
    """The next piece of the body after `size` bytes, and whether more follows."""
    if message["type"] == "http.disconnect":
        raise ClientGone(f"the connection closed after {size} bytes of the body")
    chunk = message.get("body", b"")
    if size + len(chunk) > max_bytes:
        raise TooLarge(f"body has more than {max_bytes} bytes, which is the limit")
    return chunk, message.get("more_body", False)


def brief(value: object) -> str:
    """A value of a request, shortened for an error message."""
    return _BRIEF.repr(value)


def load_json(body: bytes | memoryview) -> object:
    """Parse a JSON document in UTF-8; a byte order mark is skipped.

    Raises:
        BadFraming: the body is not valid JSON.
        TooLarge: it has more values than can be parsed at once.
    """
    if body[:3] == BYTE_ORDER_MARK:
        body = body[3:]
    if len(body) > INLINE_BYTES:
        body = bytes(body)
        _check_values(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise BadFraming(f"body is not valid JSON: {exc}") from exc


def _check_values(body: bytes) -> None:
    """Count values by their separators, also inside strings; base64 contains none."""
    lists = body.count(b"[") + body.count(b"{")
    values = body.count(b",") + LIST_VALUES * lists
    if values > MOST_VALUES:
        raise TooLarge(
            f"JSON has {values} values, where a list or an object counts as {LIST_VALUES}; "
            f"allowed: {MOST_VALUES}, or any number of pixels as binary data"
        )
    strings = body.count(b'"') // 2
    if strings > MOST_STRINGS:
        raise TooLarge(f"JSON has {strings} strings; allowed: {MOST_STRINGS}")


def raw(headers: Headers, body: bytes, max_images: int) -> list[bytes]:
    """The body is one image."""
    del headers, max_images
    return [body]


def multipart(headers: Headers, body: bytes, max_images: int) -> list[bytes]:
    """Every `image` part of `multipart/form-data` is an image."""
    return read_form(headers[b"content-type"].decode("latin-1"), body, max_images)


def instances(headers: Headers, body: bytes, max_images: int) -> list[bytes]:
    """`{"instances": [{"b64": "..."}, ...]}`: each instance is an image in base64."""
    del headers
    document = load_json(body)
    rows = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise BadFraming('body must be {"instances": [{"b64": "..."}]} with at least one instance')
    if len(rows) > max_images:
        raise TooLarge(f"request has {len(rows)} images; allowed: {max_images}")
    return [_unbase64(i, row) for i, row in enumerate(rows)]


def unbase64(name: str, text: object) -> bytes:
    """Decode base64 of a JSON document; `name` is its place in the document.

    Line breaks, the URL-safe alphabet, missing padding and a data URL's prefix are allowed.

    Raises:
        BadFraming: not a string, or not base64.
    """
    if not isinstance(text, str):
        raise BadFraming(f"{name} must be a string")
    try:
        return _decode64(text)
    except ValueError:
        pass  # not in the strict form
    try:
        loose = text.encode("ascii")
        head = DATA_URL.match(loose)
        digits = loose[head.end() if head else 0 :].translate(URL_SAFE, b" \t\r\n").rstrip(b"=")
        return _decode64(digits + b"=" * (-len(digits) % 4))
    except ValueError as exc:
        raise BadFraming(f"{name} is not valid base64: {exc}") from exc


def _decode64(digits: str | bytes) -> bytes:
    """Decode in pieces, between which other threads can run.

    Raises:
        ValueError: not strict base64.
    """
    pieces = []
    for start in range(0, len(digits), PIECE):
        piece = base64.b64decode(digits[start : start + PIECE], validate=True)
        if len(piece) % 3 and start + PIECE < len(digits):
            raise ValueError("Excess data after padding")
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _unbase64(i: int, row: object) -> bytes:
    if not isinstance(row, dict) or row.keys() != {"b64"}:
        raise BadFraming(f'instances[{i}] must be an object with one member "b64", a string')
    return unbase64(f"instances[{i}].b64", row["b64"])


def _recognised(body: bytes) -> Reader | None:
    """The reader for the first bytes of a body without a telling content type."""
    if SIGNATURE.match(body) or not body:
        return raw
    return instances if OBJECT.match(body) else None


def _unsupported(content_type: str, more: str = "") -> UnsupportedType:
    return UnsupportedType(
        f"unsupported Content-Type {content_type[:80]!r}{more}; allowed: {', '.join(READERS)}"
    )


READERS: dict[str, Reader] = {
    **dict.fromkeys(FORMATS, raw),
    "multipart/form-data": multipart,
    "application/json": instances,
}
