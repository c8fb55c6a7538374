"""`multipart/form-data` as images, each in a part named `image`.

Only bytes are read. The `charset` of a form, a part or `filename*` is ignored: some of Python's
codecs take quadratic time, and some raise on any input.
"""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import BadFraming, TooLarge, UnsupportedType

FIELD = b"image"
LONGEST_BOUNDARY = 200  # RFC 2046 allows 70
PLAIN = (b"", b"7bit", b"8bit", b"binary")


def read_form(content_type: str, body: bytes, max_images: int) -> list[bytes]:
    """The contents of all parts.

    Args:
        content_type: the header, which names the boundary.
        body: the whole form.
        max_images: parts that are read before the form is refused.

    Raises:
        BadFraming: the form is malformed, or has a part that is not named `image`.
        TooLarge: more than `max_images` parts.
        UnsupportedType: a part is encoded.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= LONGEST_BOUNDARY:
        raise BadFraming(
            f"multipart boundary has {len(boundary)} bytes; allowed: 1 to {LONGEST_BOUNDARY}"
        )
    # A preamble is ignored (RFC 2046, 5.1.1).
    delimiter = b"--" + boundary
    start = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter)
    if start < 0:
        raise BadFraming("multipart body does not contain its boundary")
    form = _Form(max_images)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": form.on_part_begin,
            "on_header_field": form.on_header_field,
            "on_header_value": form.on_header_value,
            "on_header_end": form.on_header_end,
            "on_headers_finished": form.on_headers_finished,
            "on_part_data": form.on_part_data,
            "on_end": form.on_end,
        },
    )
    try:
        parser.write(body[start:])
    except FormParserError as exc:
        raise BadFraming(f"multipart body is malformed: {exc}") from exc
    if not form.complete:
        raise BadFraming("multipart body ends before its last boundary")
    if not form.parts:
        raise BadFraming("multipart body has no parts; expected at least one named 'image'")
    return [b"".join(pieces) for pieces in form.parts]


class _Form:
    """Collects the parts of one form; raises at the first invalid one."""

    def __init__(self, max_images: int) -> None:
        self.parts: list[list[bytes]] = []
        self.complete = False
        self._max_images = max_images
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}

    def on_part_begin(self) -> None:
        if len(self.parts) == self._max_images:
            raise TooLarge(f"form has too many parts; allowed: {self._max_images} images")
        self.parts.append([])
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if name != FIELD:
            shown = "a part without a name" if name is None else f"field {_shown(name)}"
            raise BadFraming(f"form has {shown}; allowed: 'image' (repeatable)")
        encoding = self._headers.get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in PLAIN:
            raise UnsupportedType(
                f"unsupported Content-Transfer-Encoding {_shown(encoding)} of a part; "
                "allowed: binary"
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].append(data[start:end])

    def on_end(self) -> None:
        self.complete = True


def _shown(name: bytes) -> str:
    return repr(name[:40].decode("ascii", "replace"))
