"""What an image file is by one strict reading, before any pixel is decoded.

One reader finds the format, the size and the parts that hold the picture. It refuses what the
format's specification forbids, what no decoder here supports and what would make a decoder work
without bound, so that no decoder ever reads another size than the one that was checked. A decoder
is given the file without its metadata (`Header.picture`). Of these only the EXIF orientation is
read here, and an ICC profile is found; it is decompressed where a card asks for it (`Header.icc`).

The work is bounded by the number of parts (`MOST_PARTS`) and, for the entropy-coded data of a JPEG,
by the number of bytes.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import partial
from typing import NamedTuple

from app.errors import TooLarge, Unprocessable
from app.inference import heif_header
from app.inference.image_formats import BOXED, FORMATS, unsupported

# Chunks or segments of a file: MOST_PARTS, and one more for each BYTES_A_PART. Encoders write a few
# parts, and then one for every 4 KiB or more; files with one part per scanline still fit.
MOST_PARTS = 256
BYTES_A_PART = 512
MOST_SCANS = 32  # of a progressive JPEG; encoders write 10, and each visits every block
MOST_SCANS_LARGE = 12  # of one with more pixels than are ever decoded in full
PIXELS_SETTING = "SCUMBLE_LIMITS__MAX_PIXELS"
JPEG_PIXELS_SETTING = "SCUMBLE_LIMITS__MAX_JPEG_PIXELS"
MAX_SIDE = 65_500  # what libjpeg reads; PNG could say more, WebP cannot
# The Huffman codes of a lossless WebP come in groups, each of 20 bits of the file or more, and at
# most one for 4 x 4 pixels. A group takes 6 kB of libwebp's memory: 300 kB of file, 360 MiB.
MOST_GROUPS = 16_384
SMALL_JPEG = 65_536  # bytes; the scans of a larger one are not read by `inspect`
SEARCHED = 1 << 20  # bytes of a scan in one search, between which other threads have a turn
MOST_TAGS = 256  # of an EXIF block, in which the orientation is looked for
MOST_PROFILE = 1 << 20  # bytes of an ICC profile; cameras write 0.5 kB, printers 0.5 MB

Spans = tuple[tuple[int, int], ...]


class Header(NamedTuple):
    """What the strict reader found.

    Attributes:
        format: Pillow's name of it.
        width: in pixels, as the decoder will find it.
        height: in pixels.
        channels: of a plain file, fit for the quick decoder: 8 bits a channel, 1 for grey or 3 for
            RGB; 0 for every other file.
        spans: the parts that hold the picture, in order; none where that is the whole file.
        whole: read to its end; False for a large JPEG whose scans were not looked at.
        orientation: 1 to 8, as EXIF numbers them; 1 where the file says nothing.
        profile: the parts that hold an ICC profile, in order.
        head: what a decoder gets before the spans, in place of the beginning of the file.
        crop: left, top, right and bottom of the part that is shown; None for all of it.
    """

    format: str
    width: int
    height: int
    channels: int
    spans: Spans = ()
    whole: bool = True
    orientation: int = 1
    profile: Spans = ()
    head: bytes = b""
    crop: tuple[int, int, int, int] | None = None

    @property
    def pixels(self) -> int:
        """Width x height."""
        return self.width * self.height

    @property
    def plain(self) -> bool:
        """Read whole, and fit for the quick decoder."""
        return self.channels > 0

    def picture(self, data: bytes) -> bytes:
        """The file without metadata and trailing bytes: what a decoder gets."""
        if not self.spans:
            return data
        body = self.head + b"".join(data[start:end] for start, end in self.spans)
        if self.format != "WEBP":
            return body
        body += b"\x00" * (len(body) & 1)
        return RIFF.pack(b"RIFF", 4 + len(body), b"WEBP") + body

    def icc(self, data: bytes) -> bytes | None:
        """The ICC profile; None where there is none, or none of up to `MOST_PROFILE` bytes."""
        profile = b"".join(data[start:end] for start, end in self.profile)
        if self.format == "PNG" and profile:
            inflate = zlib.decompressobj()
            try:
                profile = inflate.decompress(profile, MOST_PROFILE + 1)
            except zlib.error:
                return None
        return profile if 0 < len(profile) <= MOST_PROFILE else None


def inspect(
    data: bytes, max_pixels: int, max_jpeg_pixels: int = 0, *, whole: bool = False
) -> Header:
    """Read an image file strictly, but for its pixels.

    Args:
        data: the file.
        max_pixels: width x height that is allowed.
        max_jpeg_pixels: the same of a JPEG, if that is more, half of it for a progressive one;
            the caller checks that it is decoded at a reduced size.
        whole: read the scans of a large JPEG too, which takes up to 6 ns a byte.

    Raises:
        TooLarge: more pixels than allowed, or sides that are too long.
        Unprocessable: no such file, a broken one, or one that no decoder here supports.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            return _png(data, max_pixels)
        if data.startswith(JPEG_START):
            return _jpeg(data, max_pixels, max_jpeg_pixels, whole or len(data) <= SMALL_JPEG)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data, max_pixels)
        if BOXED.match(data) and BRANDS.get(data[8:11], "AVIF") in FORMATS.values():
            return _heif(data, max_pixels)
    except (struct.error, IndexError) as exc:
        raise Unprocessable(f"image is cut off after {len(data)} bytes") from exc
    raise Unprocessable(unsupported(data))


def _check_size(width: int, height: int, max_pixels: int, setting: str = PIXELS_SETTING) -> None:
    if not width or not height:
        raise Unprocessable(f"image is {width} x {height} pixels; allowed: sides from 1")
    if width * height > max_pixels:
        raise TooLarge(
            f"image is {width} x {height} = {width * height} pixels; "
            f"allowed: {max_pixels} ({setting})"
        )
    if width > MAX_SIDE or height > MAX_SIDE:
        raise TooLarge(f"image is {width} x {height} pixels; allowed: sides up to {MAX_SIDE}")


# -- AVIF and HEIC --

BRANDS = {b"avi": "AVIF", b"hei": "HEIF", b"hev": "HEIF"}  # others are of both


def _heif(data: bytes, max_pixels: int) -> Header:
    still = heif_header.read(data, partial(_check_size, max_pixels=max_pixels))
    if still.format not in FORMATS.values():
        raise Unprocessable(unsupported(data))
    return Header(
        still.format,
        still.width,
        still.height,
        channels=0,
        spans=still.spans,
        orientation=still.orientation,
        profile=still.profile,
        head=still.head,
        crop=still.crop,
    )


def _parts(data: bytes) -> range:
    """The chunks or segments that a file of this length may have, counted."""
    return range(MOST_PARTS + len(data) // BYTES_A_PART)


def _too_many(kind: str, data: bytes) -> Unprocessable:
    return Unprocessable(
        f"{kind} has too many parts for its {len(data)} bytes; allowed: {len(_parts(data))}"
    )


class _Spans:
    """Collects what stays when parts are left out."""

    def __init__(self) -> None:
        self.start = 0
        self.found: list[tuple[int, int]] = []

    def leave_out(self, start: int, end: int) -> None:
        """These bytes do not stay."""
        if start > self.start:
            self.found.append((self.start, start))
        self.start = end

    def until(self, end: int, data: bytes) -> Spans:
        """All of them, where the file ends at `end`; none if everything stays."""
        if not self.found and not self.start and end == len(data):
            return ()
        return (*self.found, (self.start, end))


# -- PNG --

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_START = PNG_SIGNATURE + b"\x00\x00\x00\rIHDR"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
PNG_HEADER = struct.Struct(">16sIIBBBBB4xI4s")  # up to the length and kind of the second chunk
PNG_CHUNK = struct.Struct(">I4s")
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_PLAIN = {(8, 0, 0): 1, (8, 2, 0): 3}  # depth, colour type, interlaced -> channels
PALETTE = 3
TRANSPARENT = {0: 2, 2: 6}  # colour type -> bytes of the colour that is transparent
ANCILLARY = 0x20  # in the first letter of a chunk's kind: small letters may be skipped


def _png(data: bytes, max_pixels: int) -> Header:
    start, width, height, depth, colour, compression, filters, interlaced, size, kind = (
        PNG_HEADER.unpack_from(data)
    )
    if start != PNG_START:
        raise Unprocessable("PNG does not start with an IHDR chunk of 13 bytes")
    _check_size(width, height, max_pixels)
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filters or interlaced > 1:
        raise Unprocessable(
            f"PNG has an invalid header: depth {depth}, colour type {colour}, compression "
            f"{compression}, filter {filters}, interlace {interlaced}"
        )
    channels = PNG_PLAIN.get((depth, colour, interlaced), 0)
    if kind == b"IDAT" and len(data) == size + 57 and data.endswith(PNG_END) and colour != PALETTE:
        return Header("PNG", width, height, channels)  # nearly always: IHDR, IDAT, IEND
    spans, transparent, orientation, profile = _png_spans(data, colour)
    if transparent:
        channels = 0
    return Header("PNG", width, height, channels, spans, True, orientation, profile)


def _png_spans(data: bytes, colour: int) -> tuple[Spans, bool, int, Spans]:
    """The parts that stay, whether transparency is one, the orientation, and the ICC profile."""
    spans, at = _Spans(), 33
    palette, pixels, last = colour != PALETTE, False, b"IHDR"
    transparent, orientation = False, 0
    profile: Spans = ()
    for _ in _parts(data):
        size, kind = PNG_CHUNK.unpack_from(data, at)
        end = at + 12 + size
        if end > len(data):
            raise Unprocessable(f"PNG is cut off in its chunk {kind!r}")
        if kind == b"IDAT":
            if not palette or (pixels and last != b"IDAT"):
                raise Unprocessable("PNG has an IDAT chunk in the wrong place")
            pixels = True
        elif kind == b"IEND":
            if size or not pixels:
                raise Unprocessable("PNG ends without pixels (no IDAT chunk before IEND)")
            return spans.until(end, data), transparent, orientation or 1, profile
        elif kind == b"tRNS" and not (pixels or transparent) and _is_key(size, colour, palette):
            transparent = True
        elif kind == b"PLTE" and colour == PALETTE:
            if palette or size % 3 or not 3 <= size <= 768:
                raise Unprocessable(f"PNG has an invalid palette ({size} bytes)")
            palette = True
        elif kind == b"PLTE" or kind[0] & ANCILLARY:
            spans.leave_out(at, end)
            if kind == b"eXIf" and not orientation:
                orientation = _orientation(data, at + 8, at + 8 + size)
            elif kind == b"iCCP" and not (pixels or profile):
                profile = _png_profile(data, at + 8, at + 8 + size)
        else:
            raise Unprocessable(f"PNG has a chunk {kind!r} that is not supported here")
        at, last = end, kind
    raise _too_many("PNG", data)


def _is_key(size: int, colour: int, palette: bool) -> bool:
    """Whether a tRNS chunk of this size, after a palette where one is needed, is a valid one."""
    if colour == PALETTE:
        return palette and 0 < size <= 256
    return size == TRANSPARENT.get(colour)


def _png_profile(data: bytes, start: int, end: int) -> Spans:
    """The compressed profile, behind its name, a zero and the method."""
    zero = data.find(b"\x00", start, min(start + 80, end))
    return ((zero + 2, end),) if 0 <= zero < end - 2 and data[zero + 1] == 0 else ()


# -- EXIF --

BYTE_ORDERS = {b"II*\x00": "<", b"MM\x00*": ">"}
ORIENTATION, SHORT = 0x0112, 3


def _orientation(data: bytes, start: int, end: int) -> int:
    """What an EXIF block says; 1 for a malformed one, as no picture is refused for it."""
    order = BYTE_ORDERS.get(data[start : start + 4])
    if order is None or start + 8 > end:
        return 1
    at = start + struct.unpack_from(order + "I", data, start + 4)[0]
    if at + 2 > end:
        return 1
    tags = struct.unpack_from(order + "H", data, at)[0]
    for entry in range(at + 2, min(at + 2 + 12 * min(tags, MOST_TAGS), end - 11), 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", data, entry)
        if tag == ORIENTATION:
            return value if kind == SHORT and count == 1 and 1 <= value <= 8 else 1
    return 1


# -- JPEG --

JPEG_START = b"\xff\xd8\xff"
JPEG_SIZE = struct.Struct(">H")
JPEG_FRAME = struct.Struct(">HBHHB")  # length, bits, height, width, components
SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")
FILL, EOI, SOS, SOF2 = 0xFF, 0xD9, 0xDA, 0xC2
FRAMES = frozenset((0xC0, 0xC1, SOF2))  # baseline, extended, progressive: with Huffman codes
TABLES = frozenset((0xC4, 0xDB, 0xDD))  # DHT, DQT, DRI
METADATA = frozenset((*range(0xE0, 0xF0), 0xFE))  # APP0 to APP15, COM
TELLS_COLOURS = {0xE0: b"JFIF\x00", 0xEE: b"Adobe"}  # metadata that decoders need
APP1, APP2 = 0xE1, 0xE2
EXIF, ICC = b"Exif\x00\x00", b"ICC_PROFILE\x00"


def _jpeg(data: bytes, max_pixels: int, max_jpeg_pixels: int, whole: bool) -> Header:
    spans, at, scans, most_scans = _Spans(), 2, 0, 0
    width = height = channels = orientation = 0
    profile: list[tuple[int, int]] = []
    for _ in _parts(data):
        if data[at] != 0xFF:
            raise Unprocessable(f"JPEG has no marker at byte {at}")
        marker = data[at + 1]
        if marker == EOI:
            if not scans:
                raise Unprocessable("JPEG ends without pixels (no scan)")
            spans_ = spans.until(at + 2, data)
            channels = channels if scans == 1 else 0
            return Header(
                "JPEG", width, height, channels, spans_, True, orientation or 1, tuple(profile)
            )
        if marker == FILL:
            spans.leave_out(at, at + 1)
            at += 1
            continue
        end = at + 2 + JPEG_SIZE.unpack_from(data, at + 2)[0]
        if marker in METADATA:
            needed = TELLS_COLOURS.get(marker)
            if needed is None or not data.startswith(needed, at + 4):
                spans.leave_out(at, end)
                if marker == APP1 and not orientation and data.startswith(EXIF, at + 4):
                    orientation = _orientation(data, at + 10, end)
                elif marker == APP2 and data.startswith(ICC, at + 4) and at + 18 < end:
                    profile.append((at + 18, end))
        elif marker in FRAMES:
            if width:
                raise Unprocessable("JPEG has two frame headers")
            size, bits, height, width, components = JPEG_FRAME.unpack_from(data, at + 2)
            # A progressive one is held in memory whole, and visited once for each scan.
            if marker == SOF2:
                reduced = max_jpeg_pixels // 2, f"half of {JPEG_PIXELS_SETTING}: progressive"
            else:
                reduced = max_jpeg_pixels, JPEG_PIXELS_SETTING
            _check_size(width, height, *max(reduced, (max_pixels, PIXELS_SETTING)))
            if bits != 8 or components not in (1, 3, 4) or size != 8 + 3 * components:
                raise Unprocessable(
                    f"JPEG has {components} components of {bits} bits; allowed: 1, 3 or 4 of 8"
                )
            most_scans = components
            if marker == SOF2:
                most_scans = MOST_SCANS if width * height <= max_pixels else MOST_SCANS_LARGE
            channels = components if marker != SOF2 and components != 4 else 0
        elif marker == SOS:
            if not width:
                raise Unprocessable("JPEG has a scan before its frame header")
            if not whole:
                return Header("JPEG", width, height, 0, (), False, orientation or 1)
            scans += 1
            if scans > most_scans:
                raise Unprocessable(f"JPEG has too many scans; allowed: {most_scans}")
            end = _scan_end(data, end)
        elif marker not in TABLES:
            raise Unprocessable(f"JPEG has a marker FF{marker:02X} that is not supported here")
        if end < at + 4:
            raise Unprocessable(f"JPEG has a segment of invalid length at byte {at}")
        at = end
    raise _too_many("JPEG", data)


def _scan_end(data: bytes, at: int) -> int:
    """Where the marker after a scan is, from where its entropy-coded data begins."""
    for start in range(at, len(data), SEARCHED):
        found = SCAN_END.search(data, start, start + SEARCHED + 1)
        if found is not None:
            return found.start()
    raise Unprocessable("JPEG is cut off in a scan")


# -- WebP --

RIFF = struct.Struct("<4sI4s")
RIFF_CHUNK = struct.Struct("<4sI")
VP8_HEADER = struct.Struct("<3s3sHH")
ANIMATION, HAS_EXIF, HAS_ALPHA, HAS_ICC = 0x02, 0x08, 0x10, 0x20  # in the flags of VP8X


def _webp(data: bytes, max_pixels: int) -> Header:
    end = RIFF.unpack_from(data)[1] + 8
    if end > len(data):
        raise Unprocessable(f"WebP is cut off after {len(data)} bytes of {end}")
    kind, size = RIFF_CHUNK.unpack_from(data, 12)
    if kind == b"VP8X":
        return _webp_extended(data, end, max_pixels)
    width, height = _webp_bitstream(data, 12, end)
    _check_size(width, height, max_pixels)
    after = _after(12, size)
    channels = 0 if _lossless_alpha(data, 12) else 3
    return Header("WEBP", width, height, channels, () if after == len(data) else ((12, after),))


def _webp_extended(data: bytes, end: int, max_pixels: int) -> Header:
    """Of a still picture its bitstream and alpha stay, of an animation the first frame."""
    width, height = _u24(data, 24) + 1, _u24(data, 27) + 1
    _check_size(width, height, max_pixels)
    flags = data[20]
    at, head = _after(12, RIFF_CHUNK.unpack_from(data, 12)[1]), [(12, 30)]
    if at != 30:
        raise Unprocessable(f"WebP has a VP8X chunk of {at - 20} bytes; allowed: 10")
    profile: Spans = ()
    for _ in _parts(data):
        if at + 8 > end:
            raise Unprocessable("WebP ends without a picture")
        kind, size = RIFF_CHUNK.unpack_from(data, at)
        after = _after(at, size)
        if at + 8 + size > end:
            raise Unprocessable(f"WebP is cut off in its chunk {kind!r}")
        if kind in (b"VP8 ", b"VP8L", b"ANMF") and (kind == b"ANMF") == bool(flags & ANIMATION):
            if kind == b"ANMF":
                alone = _frame(data, at + 8, at + 8 + size, (width, height))
            elif _webp_bitstream(data, at, end) != (width, height):
                raise Unprocessable("WebP has a canvas and a picture of different sizes")
            else:
                alone = (at, after)
            if alone is None or len(head) > 1 or _lossless_alpha(data, alone[0]):
                channels, spans = 0, (*head, (at, after))
            else:
                channels, spans = 3, (alone,)
            orientation = _webp_orientation(data, after, end) if flags & HAS_EXIF else 1
            return Header("WEBP", width, height, channels, spans, True, orientation, profile)
        if kind == b"ANIM":
            head.append((at, after))
        elif kind == b"ALPH" and flags & HAS_ALPHA:
            _check_alpha(data, at, width, height, size)
            head.append((at, after))
        elif kind == b"ICCP" and flags & HAS_ICC:
            profile = ((at + 8, at + 8 + size),)
        at = after
    raise _too_many("WebP", data)


def _webp_orientation(data: bytes, at: int, end: int) -> int:
    """Of the EXIF chunk behind a picture; 1 where there is none."""
    for _ in _parts(data):
        if at + 8 > end:
            break
        kind, size = RIFF_CHUNK.unpack_from(data, at)
        if kind == b"EXIF":
            start = at + 8 + (len(EXIF) if data.startswith(EXIF, at + 8) else 0)
            return _orientation(data, start, min(at + 8 + size, end))
        at = _after(at, size)
    return 1


def _frame(data: bytes, at: int, end: int, canvas: tuple[int, int]) -> tuple[int, int] | None:
    """Where the bitstream of an animation's frame is, if it covers the canvas and is opaque.

    Raises:
        Unprocessable: it lies beside the canvas, or its bitstream has another size than it says.
    """
    left, top = 2 * _u24(data, at), 2 * _u24(data, at + 3)
    width, height = _u24(data, at + 6) + 1, _u24(data, at + 9) + 1
    at += 16
    kind, size = RIFF_CHUNK.unpack_from(data, at)
    alpha = kind == b"ALPH"
    if alpha:
        _check_alpha(data, at, width, height, size)
        at = _after(at, size)
    if left + width > canvas[0] or top + height > canvas[1]:
        raise Unprocessable("WebP has a frame that is larger than its canvas")
    if _webp_bitstream(data, at, end) != (width, height):
        raise Unprocessable("WebP has a frame and a picture in it of different sizes")
    if (width, height) != canvas or alpha or _lossless_alpha(data, at):
        return None
    return at, _after(at, RIFF_CHUNK.unpack_from(data, at)[1])


def _lossless_alpha(data: bytes, at: int) -> bool:
    """Whether the VP8L chunk here says that it has transparent pixels; False for a VP8 chunk."""
    return data.startswith(b"VP8L", at) and bool(data[at + 12] & 0x10)


def _check_alpha(data: bytes, at: int, width: int, height: int, size: int) -> None:
    """Of an ALPH chunk: a compressed one holds a lossless bitstream."""
    if data[at + 8] & 0x03:
        _check_lossless(width, height, size)


def _webp_bitstream(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Width and height by a VP8 or VP8L chunk."""
    kind, size = RIFF_CHUNK.unpack_from(data, at)
    if at + 8 + size > end:
        raise Unprocessable(f"WebP is cut off in its chunk {kind!r}")
    if kind == b"VP8 ":
        tag, code, width, height = VP8_HEADER.unpack_from(data, at + 8)
        if tag[0] & 1 == 0 and code == b"\x9d\x01\x2a":
            return width & 0x3FFF, height & 0x3FFF
    elif kind == b"VP8L":
        bits = int.from_bytes(data[at + 9 : at + 13], "little")
        if data[at + 8] == 0x2F and bits >> 29 == 0:
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            _check_lossless(width, height, size)
            return width, height
    raise Unprocessable(f"WebP has an invalid chunk {kind!r} where a picture is expected")


def _check_lossless(width: int, height: int, size: int) -> None:
    """Of a VP8L bitstream, also of one that holds an alpha channel."""
    groups = -(-width // 4) * -(-height // 4)
    if min(groups, size * 8 // 20) > MOST_GROUPS:
        raise TooLarge(
            f"lossless WebP is {width} x {height} pixels in {size} bytes; allowed: "
            f"{MOST_GROUPS * 16} pixels or {MOST_GROUPS * 20 // 8} bytes"
        )


def _after(at: int, size: int) -> int:
    """Where the chunk after this one begins; chunks are padded to even lengths."""
    return at + 8 + size + (size & 1)


def _u24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16
