"""Small image files that cost much time or memory, or that two parsers read differently.

`FILES` names them; `python -m loadtest.bombs` sends them to a server, and the tests of the decoder
take them one by one.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from PIL import Image

from loadtest import boxed_files

MOST_BYTES = 10 * 2**20  # what SCUMBLE_LIMITS__MAX_BODY_BYTES allows
SIDE = 2000  # its square is the default limit of pixels


# -- PNG --

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 0, interlaced: int = 0) -> bytes:
    """The chunk with the size."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def zeros(size: int) -> bytes:
    """`n` zero bytes, compressed in repeated pieces of 1 MiB."""
    many, rest = divmod(size, 2**20)
    first = zlib.compressobj(9, wbits=-15)
    last = zlib.compressobj(9, wbits=-15)
    piece = first.compress(bytes(2**20)) + first.flush(zlib.Z_FULL_FLUSH)
    end = last.compress(bytes(rest)) + last.flush()
    return b"\x78\xda" + piece * many + end + struct.pack(">HH", size % 65521, 1)


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def png(
    width: int = 28,
    height: int = 28,
    depth: int = 8,
    colour: int = 0,
    interlaced: int = 0,
    *,
    before: Iterable[bytes] = (),
    pixels: Iterable[bytes] | None = None,
    after: Iterable[bytes] = (),
) -> bytes:
    """A black picture, with chunks before and after its own."""
    row = (width * depth * CHANNELS[colour] + 7) // 8 + 1
    if pixels is None:
        pixels = [chunk(b"IDAT", zeros(row * height + (SIDE * 8 if interlaced else 0)))]
    parts = [ihdr(width, height, depth, colour, interlaced), *before, *pixels, chunk(b"IEND")]
    return b"".join((PNG_SIGNATURE, *parts, *after))


def _until_full(part: bytes, most: int = MOST_BYTES - 1000) -> list[bytes]:
    return [part] * (most // len(part))


def _apng(frames: int) -> bytes:
    control = struct.pack(">IIIIHHBB", 28, 28, 0, 0, 1, 10, 0, 0)
    picture = zeros(29 * 28)
    parts = [chunk(b"acTL", struct.pack(">II", frames, 0))]
    parts.append(chunk(b"fcTL", struct.pack(">I", 0) + control))
    later = []
    for i in range(1, frames):
        later.append(chunk(b"fcTL", struct.pack(">I", 2 * i - 1) + control))
        later.append(chunk(b"fdAT", struct.pack(">I", 2 * i) + picture))
    return png(before=parts, pixels=[chunk(b"IDAT", picture), *later])


def _noise(side: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


ZLIB_EMPTY = b"\x00\x00\x00\xff\xff"  # a stored block of no bytes

PNGS: dict[str, Callable[[], bytes]] = {
    "png-ztxt-300-mib": lambda: png(before=[chunk(b"zTXt", b"a\0\0" + zeros(300 << 20))]),
    "png-ztxt-after": lambda: png(
        pixels=[chunk(b"IDAT", zeros(29 * 28)), chunk(b"zTXt", b"a\0\0" + zeros(300 << 20))]
    ),
    "png-ztxt-many": lambda: png(
        before=_until_full(chunk(b"zTXt", b"a\0\0" + zeros(1 << 20)), 200_000)
    ),
    "png-itxt-300-mib": lambda: png(before=[chunk(b"iTXt", b"a\0\x01\0\0\0" + zeros(300 << 20))]),
    "png-iccp-300-mib": lambda: png(before=[chunk(b"iCCP", b"a\0\0" + zeros(300 << 20))]),
    "png-text-5-mib": lambda: png(before=[chunk(b"tEXt", b"a\0" + b"b" * (5_000_000))]),
    "png-exif-5-mib": lambda: png(before=[chunk(b"eXIf", b"MM\0*" + bytes(5_000_000))]),
    "png-splt-5-mib": lambda: png(before=[chunk(b"sPLT", b"a\0\x08" + bytes(5_000_000))]),
    "png-palette-5-mib": lambda: png(colour=3, before=[chunk(b"PLTE", bytes(4_999_998))]),
    "png-100000-x-100000": lambda: png(100_000, 100_000, pixels=[chunk(b"IDAT", zeros(1000))]),
    "png-1-x-4000000": lambda: png(1, 4_000_000),
    "png-4000000-x-1": lambda: png(4_000_000, 1),
    "png-1-x-65500": lambda: png(1, 65_500),
    "png-61-x-65500": lambda: png(61, 65_500, colour=2),
    "png-two-headers": lambda: png(before=[ihdr(30_000, 30_000)]),
    "png-idat-300-mib": lambda: png(pixels=[chunk(b"IDAT", zeros(300 << 20))]),
    "png-empty-idats": lambda: png(
        pixels=[*_until_full(chunk(b"IDAT")), chunk(b"IDAT", zeros(29 * 28))]
    ),
    "png-empty-texts": lambda: png(before=_until_full(chunk(b"tEXt"))),
    "png-empty-blocks": lambda: png(pixels=[chunk(b"IDAT", b"\x78\x01" + ZLIB_EMPTY * 1_000_000)]),
    "png-trailing-5-mib": lambda: png(after=[bytes(5_000_000)]),
    "png-huge-chunk-length": lambda: png(before=[b"\xff\xff\xff\xfftEXt"]),
    "png-apng-frames": lambda: _apng(20_000),
    "png-rgba": lambda: png(SIDE, SIDE, colour=6),
    "png-16-bit-rgba": lambda: png(SIDE, SIDE, 16, 6),
    "png-16-bit-grey": lambda: png(SIDE, SIDE, 16, 0),
    "png-interlaced": lambda: png(SIDE, SIDE, 8, 6, 1),
    "png-palette": lambda: png(
        SIDE, SIDE, 8, 3, before=[chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256))]
    ),
    "png-1-bit": lambda: png(SIDE, SIDE, 1, 0),
    "png-noise": lambda: _noise(1300),
}


# -- JPEG --


def segment(marker: int, body: bytes = b"") -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def frame(marker: int, width: int, height: int, components: int = 1, bits: int = 8) -> bytes:
    """A frame header."""
    parts = b"".join(bytes((i + 1, 0x11, 0)) for i in range(components))
    return segment(marker, struct.pack(">BHHB", bits, height, width, components) + parts)


@cache
def _saved(width: int, height: int, mode: str = "L", *, progressive: bool = False) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 0).save(buffer, "JPEG", progressive=progressive, subsampling=0)
    return buffer.getvalue()


def parts(data: bytes) -> list[bytes]:
    """The segments of a well-formed JPEG, each with the scan's data that follows it."""
    found, at = [data[:2]], 2
    while data[at + 1] != 0xD9:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if data[at + 1] == 0xDA:
            while not (data[end] == 0xFF and data[end + 1] not in {0, *range(0xD0, 0xD8)}):
                end += 1
        found.append(data[at:end])
        at = end
    return [*found, data[at:]]


def jpeg(
    width: int = 28,
    height: int = 28,
    mode: str = "L",
    *,
    progressive: bool = False,
    before: Iterable[bytes] = (),
    repeat_last_scan: int = 1,
    replace_frame: bytes | None = None,
    scan_data: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A black picture, with segments before its own and more or other scans."""
    start, *own, end = parts(_saved(width, height, mode, progressive=progressive))
    if replace_frame is not None:
        own = [replace_frame if part[1] in (0xC0, 0xC2) else part for part in own]
    own[-1] += scan_data
    own += [own[-1]] * (repeat_last_scan - 1)
    return b"".join((start, *before, *own, end, after))


def _two_headers() -> bytes:
    """A parser that gives RST0 a length skips the real frame header."""
    real = frame(0xC0, 30_000, 30_000)
    return b"\xff\xd8\xff\xd0" + real + frame(0xC0, 28, 28) + jpeg()[2:]


def _two_headers_in_segment() -> bytes:
    return b"\xff\xd8" + segment(0xE5, frame(0xC0, 28, 28)) + jpeg(30_000, 30_000 // 500)[2:]


def _mpo(pictures: int) -> bytes:
    entries = b"".join(struct.pack(">IIIHH", 0, 1000, 1000 * i, 0, 0) for i in range(100))
    count = struct.pack(">HHII", 0xB001, 4, 1, pictures)
    version = struct.pack(">HHI4s", 0xB000, 7, 4, b"0100")
    where = struct.pack(">HHII", 0xB002, 7, 16 * 100, 50)
    index = b"MM\0*" + struct.pack(">IH", 8, 3) + version + count + where + bytes(4) + entries
    return jpeg(before=[segment(0xE2, b"MPF\0" + index)], after=jpeg() * min(pictures, 5000))


def _icc() -> list[bytes]:
    return [
        segment(0xE2, b"ICC_PROFILE\0" + bytes((i % 256, 255)) + bytes(20_000)) for i in range(250)
    ]


def _exif_of_loops() -> bytes:
    """A directory of 5,000 entries that point at itself."""
    entry = struct.pack(">HHII", 0x8769, 4, 1, 8)
    return segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 5000) + entry * 5000)


JPEGS: dict[str, Callable[[], bytes]] = {
    "jpeg-2500-scans": lambda: jpeg(SIDE, SIDE, progressive=True, repeat_last_scan=2500),
    "jpeg-100000-scans": lambda: jpeg(SIDE, SIDE, progressive=True, repeat_last_scan=100_000),
    "jpeg-32-scans": lambda: jpeg(SIDE, SIDE, progressive=True, repeat_last_scan=27),
    "jpeg-32-scans-cmyk": lambda: jpeg(SIDE, SIDE, "CMYK", progressive=True, repeat_last_scan=10),
    "jpeg-repeated-baseline-scan": lambda: jpeg(SIDE, SIDE, repeat_last_scan=100),
    "jpeg-two-headers": _two_headers,
    "jpeg-header-in-a-segment": _two_headers_in_segment,
    "jpeg-two-frames": lambda: jpeg(before=[frame(0xC0, 30_000, 30_000)]),
    "jpeg-frame-after-the-scan": lambda: jpeg(scan_data=frame(0xC0, 30_000, 30_000)),
    "jpeg-62000-empty-segments": lambda: b"\xff\xd8" + segment(0xE1) * 62_000 + b"\xff\xd9",
    "jpeg-empty-segments-full-body": lambda: jpeg(before=_until_full(segment(0xE1))),
    "jpeg-fill-bytes": lambda: jpeg(before=[b"\xff" * 5_000_000]),
    "jpeg-stuffed-scan": lambda: jpeg(scan_data=b"\xff\x00" * 2_500_000),
    "jpeg-restarts-in-the-scan": lambda: jpeg(scan_data=b"\xff\xd0" * 2_500_000),
    "jpeg-ff-in-the-scan": lambda: jpeg(scan_data=b"\xff" * 5_000_000),
    "jpeg-zeros-in-the-scan": lambda: jpeg(SIDE, SIDE, scan_data=bytes(5_000_000)),
    "jpeg-arithmetic": lambda: jpeg(SIDE, SIDE, replace_frame=frame(0xC9, SIDE, SIDE)),
    "jpeg-lossless-arithmetic": lambda: jpeg(SIDE, SIDE, replace_frame=frame(0xCB, SIDE, SIDE)),
    "jpeg-lossless": lambda: jpeg(SIDE, SIDE, replace_frame=frame(0xC3, SIDE, SIDE)),
    "jpeg-12-bit": lambda: jpeg(replace_frame=frame(0xC1, 28, 28, bits=12)),
    "jpeg-255-components": lambda: jpeg(replace_frame=frame(0xC0, 28, 28, 255)),
    "jpeg-height-later": lambda: jpeg(
        replace_frame=frame(0xC0, 28, 0), scan_data=segment(0xDC, b"\xff\xff")
    ),
    "jpeg-lines-after-the-scan": lambda: jpeg(scan_data=segment(0xDC, b"\xff\xff")),
    "jpeg-hierarchical": lambda: jpeg(before=[frame(0xDE, SIDE, SIDE)]),
    "jpeg-restart-after-each-block": lambda: jpeg(SIDE, SIDE, before=[segment(0xDD, b"\x00\x01")]),
    "jpeg-huge-restart-interval": lambda: jpeg(before=[segment(0xDD, b"\xff\xff")]),
    "jpeg-mpo": lambda: _mpo(5000),
    "jpeg-mpo-says-4-billion": lambda: _mpo(2**32 - 1),
    "jpeg-10000-huffman-tables": lambda: jpeg(
        before=[segment(0xC4, b"\x00" + bytes(15) + b"\x01\x00")] * 10_000
    ),
    "jpeg-10000-quantizations": lambda: jpeg(before=[segment(0xDB, b"\x00" + bytes(64))] * 10_000),
    "jpeg-icc-of-250-segments": lambda: jpeg(before=_icc()),
    "jpeg-exif-of-loops": lambda: jpeg(before=[_exif_of_loops()] * 50),
    "jpeg-comments": lambda: jpeg(before=[segment(0xFE, bytes(65_000))] * 75),
    "jpeg-61-x-65500": lambda: jpeg(61, 65_500, "RGB"),
    "jpeg-plain": lambda: jpeg(SIDE, SIDE, "RGB"),
    "jpeg-cmyk": lambda: jpeg(SIDE, SIDE, "CMYK"),
}


# -- WebP --


def riff(*chunks: bytes) -> bytes:
    """A WebP file."""
    body = b"".join(chunks)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"WEBP") + body


def piece(kind: bytes, body: bytes = b"") -> bytes:
    """A chunk of a WebP."""
    return struct.pack("<4sI", kind, len(body)) + body + b"\0" * (len(body) & 1)


def u24(value: int) -> bytes:
    """An integer in little-endian bytes."""
    return value.to_bytes(3, "little")


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    """A VP8X chunk."""
    return piece(b"VP8X", bytes((flags, 0, 0, 0)) + u24(width - 1) + u24(height - 1))


@cache
def bitstream(width: int = 28, height: int = 28, *, lossless: bool = False) -> bytes:
    """The chunk of a black picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "WEBP", lossless=lossless, method=0)
    return buffer.getvalue()[12:]


def animation(width: int, height: int, *frames: bytes) -> bytes:
    """An animated WebP."""
    return riff(canvas(width, height, 0x02), piece(b"ANIM", bytes(6)), *frames)


def frame_of(
    picture: bytes, left: int = 0, top: int = 0, width: int = 28, height: int = 28
) -> bytes:
    """A frame of an animation."""
    place = u24(left // 2) + u24(top // 2) + u24(width - 1) + u24(height - 1)
    return piece(b"ANMF", place + u24(100) + b"\0" + picture)


class _Bits:
    """A stream of bits, least significant first."""

    def __init__(self) -> None:
        self._bits: list[str] = []

    def put(self, value: int, count: int) -> None:
        self._bits.append(f"{value:0{count}b}"[::-1])

    def bytes(self) -> bytes:
        text = "".join(self._bits)
        return int(text[::-1], 2).to_bytes((len(text) + 7) // 8, "little")


def huffman_groups(side: int, groups: int) -> bytes:
    """A lossless picture in which each block of 4 x 4 pixels has its own Huffman codes.

    A group of codes takes 20 bits of the file and 5.7 kB of a decoder's memory.
    """
    bits = _Bits()
    bits.put(0x2F, 8)
    for value in (side - 1, side - 1):
        bits.put(value, 14)
    bits.put(0, 4)  # no alpha, version 0
    bits.put(0, 2)  # no transform, no colour cache
    bits.put(1, 1)  # many groups of codes, for
    bits.put(0, 3)  # 4 x 4 pixels each
    bits.put(0, 1)  # the map of the groups: no colour cache; green and red have 8 bits a value
    for others in (24, 0):
        bits.put(0, 1)
        bits.put(12 - 4, 4)
        for place in range(12):
            bits.put(place in (2, 11), 3)
        bits.put(0, 1)
        bits.put((1 << 256) - 1, 256 + others)
    for _ in range(3):
        bits.put(1, 4)
    for i in range(((side + 3) // 4) ** 2):
        group = min(i, groups - 1)
        for value in (group & 255, group >> 8):
            bits.put(int(f"{value:08b}"[::-1], 2), 8)
    for _ in range(groups * 5):
        bits.put(1, 4)  # one symbol, 0, that takes no bits
    return riff(piece(b"VP8L", bits.bytes()))


def _huge_lossy() -> bytes:
    """A header of 16383 x 16383."""
    body = bitstream()[8:]
    return riff(piece(b"VP8 ", body[:6] + struct.pack("<HH", 16383, 16383) + body[10:]))


WEBPS: dict[str, Callable[[], bytes]] = {
    "webp-huge-canvas": lambda: riff(canvas(1 << 24, 1 << 24), bitstream()),
    "webp-16383-x-16383": _huge_lossy,
    "webp-lossless-16383-x-16383": lambda: riff(
        piece(b"VP8L", b"\x2f" + struct.pack("<I", 0xFFFFFFF) + bytes(100))
    ),
    "webp-small-canvas": lambda: riff(canvas(28, 28), bitstream(SIDE, SIDE)),
    "webp-large-canvas": lambda: riff(canvas(SIDE, SIDE), bitstream()),
    "webp-metadata-chunks": lambda: riff(canvas(28, 28), *_until_full(piece(b"EXIF")), bitstream()),
    "webp-chunks-after": lambda: riff(bitstream(), *_until_full(piece(b"junk"))),
    "webp-icc-5-mib": lambda: riff(
        canvas(28, 28, 0x20), piece(b"ICCP", bytes(5_000_000)), bitstream()
    ),
    "webp-frames": lambda: animation(28, 28, *_until_full(frame_of(bitstream()))),
    "webp-small-frame": lambda: animation(SIDE, SIDE, *[frame_of(bitstream(), 100, 100)] * 1000),
    "webp-frame-of-another-size": lambda: animation(28, 28, frame_of(bitstream(SIDE, SIDE))),
    "webp-huffman-groups": lambda: huffman_groups(1024, 65_536),
    "webp-huffman-groups-512": lambda: huffman_groups(512, 16_384),
    "webp-huffman-groups-frame": lambda: animation(
        1024, 1024, frame_of(huffman_groups(1024, 65_536)[12:], width=1024, height=1024)
    ),
    "webp-plain": lambda: riff(bitstream(SIDE, SIDE)),
    "webp-lossless": lambda: riff(bitstream(SIDE, SIDE, lossless=True)),
    "webp-says-4-gib": lambda: b"RIFF\xff\xff\xff\xffWEBP" + bitstream(),
}

FILES = {**PNGS, **JPEGS, **WEBPS, **boxed_files.FILES}
