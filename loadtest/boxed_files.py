"""AVIF and HEIC files, well formed or not, made box by box."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from PIL import Image, features


def box(kind: bytes, content: bytes = b"") -> bytes:
    """A box."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def full(kind: bytes, content: bytes = b"", version: int = 0, flags: int = 0) -> bytes:
    """A box with a version and flags."""
    return box(kind, struct.pack(">I", version << 24 | flags) + content)


def ispe(width: int, height: int) -> bytes:
    """The property with the size."""
    return full(b"ispe", struct.pack(">II", width, height))


class Item(NamedTuple):
    """An item of a file.

    Attributes:
        content: its bytes.
        properties: boxes.
        kind: of the item.
        method: 0 for bytes in the file, 1 for bytes in the box `idat`, 2 for those of an item.
        extents: parts into which its bytes are cut.
        essential: kinds of properties without which it is not to be read.
    """

    content: bytes
    properties: list[bytes]
    kind: bytes = b"av01"
    method: int = 0
    extents: int = 1
    essential: tuple[bytes, ...] = (b"av1C", b"hvcC")


def file(
    items: list[Item],
    references: Iterable[tuple[bytes, int, list[int]]] = (),
    *,
    primary: int = 1,
    brand: bytes = b"avif",
    more: bytes = b"",
    place: Callable[[int, int], tuple[int, int]] = lambda offset, length: (offset, length),
    media: Callable[[bytes], bytes] = lambda content: box(b"mdat", content),
) -> bytes:
    """A file of the items 1, 2, ...

    Args:
        items: in their order.
        references: kind, from, to.
        primary: the number of the picture.
        brand: of the file.
        more: boxes that are put at the end of `meta`.
        place: what is written of an extent's offset and length.
        media: the box around the bytes.
    """
    ftyp = box(b"ftyp", brand + bytes(4) + b"mif1miaf" + brand)
    inside = b"".join(item.content for item in items if item.method == 1)
    outside = b"".join(item.content for item in items if item.method == 0)
    wrapped = media(outside)
    behind = wrapped.index(outside) if outside else 0

    def meta(start: int) -> bytes:
        return _meta(items, references, primary, more, inside, start, place)

    return ftyp + meta(len(ftyp) + len(meta(0)) + behind) + wrapped


def _meta(
    items: list[Item],
    references: Iterable[tuple[bytes, int, list[int]]],
    primary: int,
    more: bytes,
    inside: bytes,
    start: int,
    place: Callable[[int, int], tuple[int, int]],
) -> bytes:
    properties: list[bytes] = []
    infe, iloc, ipma = b"", b"", b""
    at = [start, 0, 0]
    for number, item in enumerate(items, 1):
        infe += full(b"infe", struct.pack(">HH4sx", number, 0, item.kind), version=2)
        iloc += struct.pack(">HHHH", number, item.method, 0, item.extents)
        length = len(item.content) // item.extents
        for i in range(item.extents):
            size = length if i + 1 < item.extents else len(item.content) - length * i
            iloc += struct.pack(">II", *place(at[item.method], size))
            at[item.method] += size
        ipma += struct.pack(">HB", number, len(item.properties))
        for each in item.properties:
            properties.append(each)
            ipma += struct.pack(">H", len(properties) | 0x8000 * (each[4:8] in item.essential))
    links = b"".join(
        box(kind, struct.pack(f">HH{len(to)}H", source, len(to), *to))
        for kind, source, to in references
    )
    return full(
        b"meta",
        full(b"hdlr", struct.pack(">4x4s13x", b"pict"))
        + full(b"pitm", struct.pack(">H", primary))
        + full(b"iloc", struct.pack(">HH", 0x4400, len(items)) + iloc, version=1)
        + full(b"iinf", struct.pack(">H", len(items)) + infe)
        + box(
            b"iprp",
            box(b"ipco", b"".join(properties))
            + full(b"ipma", struct.pack(">I", len(items)) + ipma, flags=1),
        )
        + (full(b"iref", links) if links else b"")
        + (box(b"idat", inside) if inside else b"")
        + more,
    )


# -- coded pictures, of Pillow's own encoder --

AV1C = box(b"av1C", b"\x81\x20\x00\x00")  # profile 1, 8 bits, 4:4:4
AV1C_10 = box(b"av1C", b"\x81\x20\x40\x00")
NCLX = box(b"colr", b"nclx" + struct.pack(">HHHB", 1, 13, 6, 0x80))


@cache
def av1(width: int, height: int, colour: int | tuple[int, int, int] = 0) -> bytes:
    """The AV1 data of a picture of one colour, 8 bits and 4:4:4."""
    buffer = io.BytesIO()
    picture = Image.new("RGB", (width, height), colour)
    picture.save(buffer, "AVIF", quality=90, speed=10, subsampling="4:4:4")
    return media_of(buffer.getvalue())


@cache
def av1_10_bits(width: int, height: int) -> bytes:
    """The same of black with 10 bits."""
    black = np.zeros((height, width, 3), np.uint16)
    return media_of(
        imagecodecs.avif_encode(
            black, bitspersample=10, level=90, pixelformat="444", speed=10, numthreads=1
        )
    )


def media_of(data: bytes | bytearray) -> bytes:
    """What the first mdat box of a file holds, which comes last."""
    return bytes(data[data.index(b"mdat") + 4 :])


def picture(
    width: int, height: int, colour: int | tuple[int, int, int] = 0, **changes: Any
) -> Item:
    """An item of one colour."""
    item = Item(av1(width, height, colour), [ispe(width, height), AV1C, NCLX])
    return item._replace(**changes)


def grid(
    columns: int, rows: int, width: int, height: int, tile: Item, **changes: Any
) -> tuple[list[Item], list[tuple[bytes, int, list[int]]]]:
    """A grid of the same tile, with its references."""
    content = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width & 0xFFFF, height & 0xFFFF)
    if max(width, height) > 0xFFFF:
        content = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)
    whole = Item(content, [ispe(width, height), NCLX], b"grid", method=1)._replace(**changes)
    tiles = [tile] * (columns * rows)
    return [whole, *tiles], [(b"dimg", 1, list(range(2, len(tiles) + 2)))]


SIDE = 2000  # its square is the default limit of pixels
ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\x00"


def with_alpha(colour: Item, alpha: Item) -> bytes:
    """A file of a picture and its transparency."""
    named = alpha._replace(properties=[*alpha.properties, full(b"auxC", ALPHA)])
    return file([colour, named], [(b"auxl", 2, [1])])


def _ten_bits(width: int, height: int) -> Item:
    return Item(av1_10_bits(width, height), [ispe(width, height), AV1C_10, NCLX])


def _long_lists(size: int) -> bytes:
    """A file whose items each have 255 properties."""
    many = picture(64, 64)._replace(kind=b"mime", properties=[box(b"free")] * 255)
    return file([picture(64, 64), *[many._replace(content=b"x")] * size])


AVIFS: dict[str, Callable[[], bytes]] = {
    "avif-plain": lambda: file([picture(SIDE, SIDE)]),
    "avif-10-bit-alpha": lambda: with_alpha(_ten_bits(SIDE, SIDE), _ten_bits(SIDE, SIDE)),
    "avif-256-tiles": lambda: file(*grid(16, 16, 1024, 1024, picture(64, 64))),
    "avif-1024-tiles": lambda: file(*grid(32, 32, 1920, 1920, picture(64, 64))),
    "avif-huge-tiles": lambda: file(
        *grid(1, 2, 1900, 1900, picture(64, 64, properties=[ispe(2**31, 1900), AV1C]))
    ),
    "avif-tiles-beyond-the-edge": lambda: file(*grid(16, 16, 64, 64, picture(64, 64))),
    "avif-says-100000-x-100000": lambda: file(
        [picture(64, 64, properties=[ispe(100_000, 100_000), AV1C])]
    ),
    "avif-says-64-is-2000": lambda: file([picture(SIDE, SIDE, properties=[ispe(64, 64), AV1C])]),
    "avif-many-boxes": lambda: file([picture(64, 64)], more=box(b"free") * 1_000_000),
    "avif-nested-boxes": lambda: file([picture(64, 64)], more=nested(1000)),
    "avif-2000-items": lambda: file([picture(64, 64)] * 2000),
    "avif-long-lists": lambda: _long_lists(200),
    "avif-1000-frames": lambda: file([picture(64, 64, content=av1(64, 64) * 1000)]),
    "avif-empty-units": lambda: file([picture(64, 64, content=b"\x7a\x00" * 1_000_000)]),
    "avif-one-place-for-all": lambda: file(
        *grid(16, 16, 1024, 1024, picture(64, 64, content=av1(64, 64) + bytes(30_000))),
        place=lambda offset, length: (offset, 60_000 if length > 8 else length),
    ),
}


def nested(depth: int) -> bytes:
    """Boxes in boxes."""
    inner = b""
    for _ in range(depth):
        inner = box(b"meta", inner)
    return inner


# Without an encoder in Pillow there are none.
FILES = AVIFS if "avif" in features.get_supported_modules() else {}
