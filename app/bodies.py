"""A request's body -> the encoded images in it: raw, multipart or base64 in JSON.

One reader per content type in `READERS`; each checks the framing and the number of images, none
decodes one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

import orjson
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message, Receive

from app.errors import (
    BadFraming,
    ClientGone,
    RequestError,
    TooLarge,
    Unprocessable,
    UnsupportedType,
)
from app.formats import FORMATS

# A request's headers, names in small letters, as `dict` makes it of ASGI's pairs: to look a few up
# in Starlette's own takes longer than to decode a small image.
Fields = Mapping[bytes, bytes]
Reader = Callable[[Fields, bytes, int], Awaitable[list[bytes]]]


async def read_images(
    fields: Fields, receive: Receive, *, max_bytes: int, max_images: int
) -> list[bytes]:
    """The encoded images of a request, at least one.

    Raises:
        UnsupportedType: a content type that is not in `READERS`, or a compressed body.
        TooLarge: over `max_bytes` or `max_images`.
        BadFraming: the body is not what the content type says.
        Unprocessable: it holds no image.
    """
    declared = fields.get(b"content-type", b"").decode("latin-1")
    content_type = declared.partition(";")[0].strip().lower()
    reader = READERS.get(content_type)
    if reader is None:
        raise UnsupportedType(f"Content-Type is {content_type!r}; allowed: {', '.join(READERS)}")
    refuse_encoding(fields)
    body = await read_body(fields, receive, max_bytes)
    images = await reader(fields, body, max_images)
    if len(images) > max_images:
        raise TooLarge(f"the request has {len(images)} images; allowed: {max_images}")
    if not all(images):
        raise Unprocessable("an image is empty (0 bytes)" if body else "the body is empty")
    return images


def small_number(text: str) -> int | None:
    """A whole number of up to 15 digits, else None; Python raises on thousands of them."""
    return int(text) if len(text) <= 15 and text.isascii() and text.isdecimal() else None


def refuse_encoding(fields: Fields) -> None:
    """Compressed bodies could unpack to anything.

    Raises:
        UnsupportedType: the body is compressed.
    """
    encoding = fields.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        name = encoding.decode("latin-1")
        raise UnsupportedType(f"Content-Encoding is {name!r}; allowed: identity")


async def read_body(fields: Fields, receive: Receive, max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` of it.

    Raises:
        TooLarge: more than `max_bytes`, declared or sent.
        ClientGone: the client went away in the middle.
    """
    _declared(fields, max_bytes)
    body, more = _piece(await receive(), 0, max_bytes)
    if not more:  # nearly always
        return body
    chunks, size = [body], len(body)
    while more:
        chunk, more = _piece(await receive(), size, max_bytes)
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


async def read_buffer(fields: Fields, receive: Receive, max_bytes: int) -> bytes | bytearray:
    """The same in one writable buffer, which grows as the body arrives, if its length is declared.

    An array over that buffer can be lent to an engine without another copy.

    Raises:
        TooLarge, ClientGone: as in `read_body`.
        BadFraming: the length is not the declared one.
    """
    declared = _declared(fields, max_bytes)
    if not declared:
        return await read_body(fields, receive, max_bytes)
    body, more = bytearray(), True
    while more:
        chunk, more = _piece(await receive(), len(body), declared)
        body += chunk  # grows by an eighth beyond what it holds: no copy for each piece
    if len(body) < declared:
        raise BadFraming(f"the body has {len(body)} bytes; its headers say {declared}")
    return body


def _declared(fields: Fields, max_bytes: int) -> int:
    """Bytes of the body by its headers, 0 if they do not say."""
    declared = small_number(fields.get(b"content-length", b"0").decode("latin-1")) or 0
    if declared > max_bytes:
        raise TooLarge(f"the body has {declared} bytes; allowed: {max_bytes}")
    return declared


def _piece(message: Message, size: int, max_bytes: int) -> tuple[bytes, bool]:
    """What came after `size` bytes of the body, and whether there is more."""
    if message["type"] == "http.disconnect":
        raise ClientGone(f"the connection closed after {size} bytes of the body")
    chunk = message.get("body", b"")
    if size + len(chunk) > max_bytes:
        raise TooLarge(f"the body has more than {max_bytes} bytes, which is the limit")
    return chunk, message.get("more_body", False)


async def raw(fields: Fields, body: bytes, max_images: int) -> list[bytes]:
    """The body is one image."""
    del fields, max_images
    return [body]


async def multipart(fields: Fields, body: bytes, max_images: int) -> list[bytes]:
    """Every `image` part of `multipart/form-data` is an image."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        if not parser.complete:  # raised here, inside parse(), so that it closes the open part
            raise MultiPartException("cut off before its last boundary")

    headers = Headers(raw=list(fields.items()))
    parser = _Form(headers, stream(), max_files=max_images, max_fields=1, max_part_size=len(body))
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as exc:
        raise _too_many_or_malformed(exc.message, max_images) from exc
    except (KeyError, UnicodeDecodeError) as exc:
        raise BadFraming("the multipart body has no boundary or a broken part header") from exc
    try:
        parts = form.multi_items()
        names = sorted({name for name, _ in parts} - {"image"})
        if names or not parts:
            raise BadFraming(f"the form has the fields {names}; allowed: image (repeatable)")
        files = [part for _, part in parts if isinstance(part, UploadFile)]
        if len(files) < len(parts):
            raise BadFraming("field image has no file name: send it as a file part")
        return [await file.read() for file in files]
    finally:
        await form.close()


async def instances(fields: Fields, body: bytes, max_images: int) -> list[bytes]:
    """`{"instances": [{"b64": "..."}, ...]}`: each instance is an image in base64."""
    del fields
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise BadFraming(f"the body is no JSON: {exc}") from exc
    rows = document.get("instances") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise BadFraming(
            'the body must be {"instances": [{"b64": "..."}]} with an instance or more'
        )
    if len(rows) > max_images:
        raise TooLarge(f"the request has {len(rows)} images; allowed: {max_images}")
    return [_unbase64(i, row) for i, row in enumerate(rows)]


def unbase64(name: str, text: object) -> bytes:
    """The bytes of base64 as JSON carries it; `name` says where it stood.

    Raises:
        BadFraming: no string, or not base64.
    """
    if not isinstance(text, str):
        raise BadFraming(f"{name} must be a string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadFraming(f"{name} is no base64: {exc}") from exc


class _Form(MultiPartParser):
    """Keeps all parts in memory, as the body already is, and knows whether the body was whole."""

    complete = False

    def on_end(self) -> None:
        self.complete = True


def _unbase64(i: int, row: object) -> bytes:
    if not isinstance(row, dict) or row.keys() != {"b64"}:
        raise BadFraming(f'instances[{i}] must be an object with one member "b64", a string')
    return unbase64(f"instances[{i}].b64", row["b64"])


def _too_many_or_malformed(message: str, max_images: int) -> RequestError:
    if message.startswith("Too many"):
        return TooLarge(f"the form has too many parts; allowed: {max_images} images")
    return BadFraming(f"the multipart body is malformed: {message}")


READERS: dict[str, Reader] = {
    **dict.fromkeys(FORMATS, raw),
    "multipart/form-data": multipart,
    "application/json": instances,
}
