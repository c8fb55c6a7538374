"""What an AVIF or HEIC file is by one strict reading, before any pixel is decoded.

Both are files of boxes (ISO/IEC 14496-12 and 23008-12) that hold items: coded pictures, grids of
them, their transparency, and much else. Read are the primary item, its properties and the items
that it is made of; of a sequence that is its first frame. `Still.head` is the beginning of a new
file with these alone, which a decoder gets: it sees no box that was not checked, turns nothing, and
crops nothing. Where the picture lies in the file, how it is turned and cropped, and its ICC profile
are said beside it.

The work is bounded by the numbers below and by the bytes of the file: together, the items that are
used have at most as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from app.errors import Unprocessable
from app.inference.coded_pictures import Size, av1_size, check_hevc, hevc_configuration

MOST_BOXES = 4096
MOST_ITEMS = 1024
MOST_TILES = 256  # a photo of 48 megapixels in tiles of 512 x 512 has 192
MOST_ENTRIES = 8192  # in all lists of places, properties and references
MOST_UNITS = 8192  # of coded data: AV1's open bitstream units, HEVC's slices and messages

Span = tuple[int, int]
Box = tuple[bytes, int, int]  # kind, where its content begins, where it ends
Link = tuple[bytes, int, list[int]]  # kind of a reference, the item that has it, to which items

# EXIF's number by quarter turns against the clock, and then the axis of a mirror.
ORIENTATIONS = {
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7,
    (0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5,
}  # fmt: skip
FORMATS = {b"av01": "AVIF", b"hvc1": "HEIF"}
CONFIGURATION = {b"av01": b"av1C", b"hvc1": b"hvcC"}
ALPHA = (
    b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\x00",
    b"urn:mpeg:hevc:2015:auxid:1\x00",
)
TURNED = (b"clap", b"irot", b"imir")  # what changes the picture, in the order of the standard
KNOWN = frozenset((*TURNED, b"ispe", b"pixi", b"colr", b"av1C", b"hvcC", b"auxC", b"pasp"))


class Still(NamedTuple):
    """The primary picture of a file.

    Attributes:
        format: Pillow's name of it.
        width: in pixels, as the decoder will find it: neither turned nor cropped.
        height: in pixels.
        head: a new file up to the coded data.
        spans: the coded data that follow `head`, in order.
        orientation: 1 to 8, as EXIF numbers them.
        crop: left, top, right and bottom in the picture that is not turned; None for all of it.
        profile: where an ICC profile is.
    """

    format: str
    width: int
    height: int
    head: bytes
    spans: tuple[Span, ...]
    orientation: int
    crop: tuple[int, int, int, int] | None
    profile: tuple[Span, ...]


def read(data: bytes, check_size: Callable[[int, int], None]) -> Still:
    """Read a file that starts with an `ftyp` box.

    Args:
        data: the file.
        check_size: called with each width and height before the coded data are read; what it
            raises passes through.

    Raises:
        IndexError: cut off.
        Unprocessable: a broken one, or one that is not supported here.
    """
    return _Reader(data, check_size).still()


class _Numbers:
    """Reads big-endian numbers from a box, never beyond it."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self.data, self.at, self.end = data, start, end

    def take(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "big")

    def signed(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "big", signed=True)

    def bytes(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > self.end:
            raise IndexError("the box is cut off")
        return self.data[start : self.at]


class _Item:
    """An item of the file."""

    def __init__(self, kind: bytes) -> None:
        self.kind = kind
        self.spans: list[Span] = []
        self.properties: dict[bytes, list[Span]] = {}
        self.order: list[bytes] = []
        self.unsupported = b""  # a property without which it is not to be read

    def one(self, kind: bytes) -> Span | None:
        """Where its property of a kind is; None for none.

        Raises:
            Unprocessable: there are several.
        """
        found = self.properties.get(kind, [])
        if len(found) > 1:
            raise Unprocessable(f"image has an item with two properties {kind!r}")
        return found[0] if found else None


class _Made(NamedTuple):
    """An item of the new file."""

    kind: bytes
    properties: list[bytes]
    content: bytes  # of a grid
    spans: list[Span]


class _Reader:
    def __init__(self, data: bytes, check_size: Callable[[int, int], None]) -> None:
        self.data = data
        self.check_size = check_size
        self.boxes_left = MOST_BOXES
        self.entries_left = MOST_ENTRIES
        self.bytes_left = len(data)
        self.units = iter(range(MOST_UNITS))
        self.items: dict[int, _Item] = {}
        self.references: dict[bytes, dict[int, list[int]]] = {}
        self.idat: Span | None = None

    def still(self) -> Still:
        file = self.boxes(0, len(self.data))
        if next(file, (b"", 0, 0))[0] != b"ftyp":
            raise Unprocessable("image does not start with an ftyp box")
        meta = self.only(list(file), b"meta")
        primary = self.read_meta(meta)
        made, size = self.make(primary)
        links: list[Link] = []
        alpha = self.alpha_of(primary)
        if alpha is not None:
            auxiliary, alpha_size = self.make(alpha)
            if alpha_size != size or auxiliary[-1].kind != made[-1].kind:
                raise Unprocessable("image has an alpha channel of another size or codec")
            links.append((b"auxl", len(made) + 1, [1]))
            if alpha in self.references.get(b"prem", {}).get(primary, []):
                links.append((b"prem", 1, [len(made) + 1]))
            made += auxiliary
        item = self.item(primary)
        orientation, crop = self.turned(item, size)
        return Still(
            FORMATS[made[-1].kind],
            *size,
            _file(made, links),
            tuple(span for one in made for span in one.spans),
            orientation,
            crop,
            self.profile(item),
        )

    # -- boxes --

    def boxes(self, start: int, end: int) -> Iterator[Box]:
        """The boxes that fill a part of the file.

        Raises:
            IndexError: one is cut off.
            Unprocessable: too many, or one of an invalid size.
        """
        while start < end:
            numbers = _Numbers(self.data, start, end)
            size, kind = numbers.take(4), numbers.bytes(4)
            if size == 1:
                size = numbers.take(8)
            elif size == 0:
                size = end - start
            self.boxes_left -= 1
            if self.boxes_left < 0:
                raise Unprocessable(f"image has too many boxes; allowed: {MOST_BOXES}")
            if size < numbers.at - start:
                raise Unprocessable(f"image has a box {kind!r} of the invalid size {size}")
            if start + size > end:
                raise IndexError(f"the box {kind!r} is cut off")
            yield kind, numbers.at, start + size
            start += size

    def only(self, boxes: list[Box], kind: bytes) -> Box:
        """The one box of a kind.

        Raises:
            Unprocessable: none, or several.
        """
        found = [box for box in boxes if box[0] == kind]
        if len(found) != 1:
            raise Unprocessable(f"image has {len(found)} boxes {kind!r}; allowed: 1")
        return found[0]

    def full(self, box: Box) -> tuple[int, int, _Numbers]:
        """Version, flags and content of a box that has them."""
        numbers = _Numbers(self.data, box[1], box[2])
        return numbers.take(1), numbers.take(3), numbers

    # -- what the file says --

    def read_meta(self, meta: Box) -> int:
        """Read the items, and give the number of the primary one."""
        boxes = list(self.boxes(meta[1] + 4, meta[2]))
        _, _, handler = self.full(self.only(boxes, b"hdlr"))
        if handler.bytes(8)[4:] != b"pict":
            raise Unprocessable("image has a meta box that is not of a picture")
        self.read_kinds(self.only(boxes, b"iinf"))
        if any(box[0] == b"idat" for box in boxes):
            self.idat = self.only(boxes, b"idat")[1:]
        self.read_locations(self.only(boxes, b"iloc"))
        self.read_properties(self.only(boxes, b"iprp"))
        if any(box[0] == b"iref" for box in boxes):
            self.read_references(self.only(boxes, b"iref"))
        version, _, numbers = self.full(self.only(boxes, b"pitm"))
        return numbers.take(2 if version == 0 else 4)

    def read_kinds(self, box: Box) -> None:
        version, _, numbers = self.full(box)
        count = numbers.take(2 if version == 0 else 4)
        self.check_count("items", count, MOST_ITEMS)
        for kind, start, end in self.boxes(numbers.at, box[2]):
            version, _, entry = self.full((kind, start, end))
            if kind != b"infe" or version not in (2, 3):
                raise Unprocessable(f"image has a box {kind!r} of version {version} in iinf")
            number, protection = entry.take(2 if version == 2 else 4), entry.take(2)
            if number in self.items or len(self.items) >= count:
                raise Unprocessable(f"image has two items of the number {number}, or too many")
            if not protection:
                self.items[number] = _Item(entry.bytes(4))

    def read_locations(self, box: Box) -> None:
        version, _, numbers = self.full(box)
        sizes = numbers.take(2)
        offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
        index_size = sizes & 15 if version else 0
        if version > 2 or not {offset_size, length_size, base_size, index_size} <= {0, 4, 8}:
            raise Unprocessable("image has an invalid iloc box")
        wide = 4 if version == 2 else 2
        count, seen = numbers.take(wide), set()
        self.check_count("items", count, MOST_ITEMS)
        for _ in range(count):
            number = numbers.take(wide)
            method = numbers.take(2) & 15 if version else 0
            other_file, base, extents = numbers.take(2), numbers.take(base_size), numbers.take(2)
            self.count_entries(extents)
            if number in seen:
                raise Unprocessable(f"image has two places of the item {number}")
            seen.add(number)
            spans: list[Span] = []
            for _ in range(extents):
                numbers.take(index_size)
                start, length = base + numbers.take(offset_size), numbers.take(length_size)
                spans.append((start, start + length))
            item = self.items.get(number)
            if item is not None and method < 2 and not other_file:
                item.spans = self.within(method, spans)

    def within(self, method: int, spans: list[Span]) -> list[Span]:
        """Places in the file, of places in it or in its `idat` box.

        Those of an item that is not used may be wrong: they are empty then.
        """
        start, end = (0, len(self.data)) if method == 0 else self.idat or (0, 0)
        moved = [(start + first, start + last) for first, last in spans]
        return moved if all(first < last <= end for first, last in moved) else []

    def read_properties(self, box: Box) -> None:
        boxes = list(self.boxes(box[1], box[2]))
        container = self.only(boxes, b"ipco")
        properties = list(self.boxes(container[1], container[2]))
        version, flags, numbers = self.full(self.only(boxes, b"ipma"))
        count = numbers.take(4)
        self.check_count("items", count, MOST_ITEMS)
        wide, seen = (2 if flags & 1 else 1), set()
        for _ in range(count):
            number = numbers.take(2 if version == 0 else 4)
            if number in seen:
                raise Unprocessable(f"image has two lists of properties of the item {number}")
            seen.add(number)
            item = self.items.get(number, _Item(b""))
            entries = numbers.take(1)
            self.count_entries(entries)
            for _ in range(entries):
                index = numbers.take(wide)
                essential, index = index >> (8 * wide - 1), index & ((1 << (8 * wide - 1)) - 1)
                if index > len(properties):
                    raise Unprocessable(f"image has no property {index}")
                if not index:
                    continue
                kind, start, end = properties[index - 1]
                if essential and kind not in KNOWN:
                    item.unsupported = kind
                item.order.append(kind)
                item.properties.setdefault(kind, []).append((start, end))

    def read_references(self, box: Box) -> None:
        version, _, numbers = self.full(box)
        wide = 2 if version == 0 else 4
        for kind, start, end in self.boxes(numbers.at, box[2]):
            entry = _Numbers(self.data, start, end)
            source, count = entry.take(wide), entry.take(2)
            self.count_entries(count)
            of_kind = self.references.setdefault(kind, {})
            if source in of_kind:
                raise Unprocessable(f"image has two lists of references {kind!r} of one item")
            of_kind[source] = [entry.take(wide) for _ in range(count)]

    def check_count(self, what: str, count: int, most: int) -> None:
        if count > most:
            raise Unprocessable(f"image has {count} {what}; allowed: {most}")

    def count_entries(self, count: int) -> None:
        self.entries_left -= count
        if self.entries_left < 0:
            raise Unprocessable(f"image has too long lists of items; allowed: {MOST_ENTRIES}")

    # -- the picture --

    def alpha_of(self, primary: int) -> int | None:
        """The number of the item with a picture's transparency."""
        for number, targets in self.references.get(b"auxl", {}).items():
            item = self.items.get(number)
            span = None if item is None else item.one(b"auxC")
            if span is None or primary not in targets:
                continue
            if self.data.startswith(ALPHA, span[0] + 4, span[1]):
                return number
        return None

    def item(self, number: int) -> _Item:
        """An item that is used.

        Raises:
            Unprocessable: there is none, or none that can be read.
        """
        item = self.items.get(number)
        if item is None:
            raise Unprocessable(f"image has no item {number} that can be read")
        if item.unsupported:
            raise Unprocessable(f"image needs {item.unsupported!r}, which is not supported here")
        return item

    def make(self, number: int) -> tuple[list[_Made], Size]:
        """The items of the new file for one picture, and its size.

        Args:
            number: of the item in the file.
        """
        item = self.item(number)
        size = self.size_of(item)
        self.check_size(*size)
        if item.kind != b"grid":
            return [self.coded(item, size)], size
        content = self.content(item)
        numbers = _Numbers(content, 0, len(content))
        version, wide = numbers.take(1), 2 << (numbers.take(1) & 1)
        rows, columns = numbers.take(1) + 1, numbers.take(1) + 1
        output = numbers.take(wide), numbers.take(wide)
        tiles = self.references.get(b"dimg", {}).get(number, [])
        self.check_count("tiles", len(tiles), MOST_TILES)
        if version or output != size or len(tiles) != rows * columns:
            raise Unprocessable(
                f"image of {size[0]} x {size[1]} pixels has an invalid grid of {columns} x {rows} "
                f"tiles for {output[0]} x {output[1]}"
            )
        parts = [self.item(tile) for tile in tiles]
        width, height = self.size_of(parts[0])
        # The last column and row reach up to the edge or over it, but do not lie beyond it.
        across, down = columns * width - size[0], rows * height - size[1]
        if not (0 <= across < width and 0 <= down < height):
            raise Unprocessable(
                f"image of {size[0]} x {size[1]} pixels has a grid of {columns} x {rows} tiles of "
                f"{width} x {height}"
            )
        self.check_size(columns * width, rows * height)
        made = [_Made(b"grid", self.kept(item), content, [])]
        made += [self.coded(part, (width, height)) for part in parts]
        if len({part.kind for part in made[1:]}) != 1:
            raise Unprocessable("image has a grid of tiles of several codecs")
        return made, size

    def coded(self, item: _Item, size: Size) -> _Made:
        """A coded picture, which has the size that its item says."""
        span = item.one(CONFIGURATION.get(item.kind, b""))
        if span is None:
            raise Unprocessable(
                f"image has a picture of the kind {item.kind!r}, not supported here; allowed: "
                f"{', '.join(kind.decode() for kind in FORMATS)} and grids of them"
            )
        content, config = self.content(item), self.data[span[0] : span[1]]
        if item.kind == b"av01":
            found, config = av1_size(content, self.units), config[:4]
        else:
            found, length_bytes = hevc_configuration(config)
            check_hevc(content, length_bytes, self.units)
        if found != size or self.size_of(item) != size:
            raise Unprocessable(f"image says two sizes: {size}, {found}")
        properties = [*self.kept(item), _box(CONFIGURATION[item.kind], config)]
        return _Made(item.kind, properties, b"", item.spans)

    def content(self, item: _Item) -> bytes:
        """The bytes of an item.

        Raises:
            Unprocessable: none, or more than the file has.
        """
        self.bytes_left -= sum(end - start for start, end in item.spans)
        if not item.spans or self.bytes_left < 0:
            raise Unprocessable("image has an item whose bytes are not in the file")
        return b"".join(self.data[start:end] for start, end in item.spans)

    def size_of(self, item: _Item) -> Size:
        span = item.one(b"ispe")
        if span is None:
            raise Unprocessable("image has a picture without a size (no ispe property)")
        _, _, numbers = self.full((b"ispe", *span))
        return numbers.take(4), numbers.take(4)

    def kept(self, item: _Item) -> list[bytes]:
        """The properties that a decoder needs, as boxes."""
        kept = [(b"ispe", item.one(b"ispe")), (b"pixi", item.one(b"pixi"))]
        kept += [(b"auxC", item.one(b"auxC"))]
        for start, end in item.properties.get(b"colr", [])[:2]:
            if self.data.startswith(b"nclx", start, end):
                kept.append((b"colr", (start, end)))
        return [_box(kind, self.data[span[0] : span[1]]) for kind, span in kept if span]

    def profile(self, item: _Item) -> tuple[Span, ...]:
        for start, end in item.properties.get(b"colr", []):
            if self.data.startswith((b"prof", b"rICC"), start, end):
                return ((start + 4, end),)
        return ()

    def turned(self, item: _Item, size: Size) -> tuple[int, tuple[int, int, int, int] | None]:
        """EXIF's number of how a picture is turned, and the part of it that is shown."""
        order = [TURNED.index(kind) for kind in item.order if kind in TURNED]
        if order != sorted(set(order)):
            raise Unprocessable("image is cropped and turned in an order that is not allowed")
        turns, axis = item.one(b"irot"), item.one(b"imir")
        quarters = 0 if turns is None else _Numbers(self.data, *turns).take(1) & 3
        mirror = None if axis is None else _Numbers(self.data, *axis).take(1) & 1
        clap = item.one(b"clap")
        crop = None if clap is None else _crop(_Numbers(self.data, *clap), size)
        return ORIENTATIONS[quarters, mirror], crop


def _crop(numbers: _Numbers, size: Size) -> tuple[int, int, int, int]:
    """The part of a picture that a `clap` property shows."""
    fields = [(numbers.signed(4), numbers.take(4)) for _ in range(4)]
    if not all(denominator for _, denominator in fields):
        raise Unprocessable("image has an invalid clap property (a denominator is 0)")
    width, height, across, down = (Fraction(*field) for field in fields)
    left, top = (size[0] - width) / 2 + across, (size[1] - height) / 2 + down
    box = (left, top, left + width, top + height)
    whole = all(edge.denominator == 1 for edge in box)
    if not (whole and 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        raise Unprocessable("image has a clap property that is not a part of it in whole pixels")
    return int(box[0]), int(box[1]), int(box[2]), int(box[3])


# -- the new file --


def _box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def _full_box(kind: bytes, content: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, bytes((version, *flags.to_bytes(3, "big"))) + content)


def _u16(number: int) -> bytes:
    return number.to_bytes(2, "big")


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _file(made: list[_Made], links: list[Link]) -> bytes:
    """The file of some items, the first of them the primary one, up to their spans."""
    brand = {"AVIF": b"avif", "HEIF": b"heic"}[FORMATS[made[-1].kind]]
    ftyp = _box(b"ftyp", brand + _u32(0) + b"mif1miaf" + brand)
    start = len(ftyp) + len(_meta(made, links, 0)) + 8
    content = b"".join(one.content for one in made)
    length = sum(end - first for one in made for first, end in one.spans)
    mdat = _u32(8 + len(content) + length) + b"mdat"
    return ftyp + _meta(made, links, start) + mdat + content


def _meta(made: list[_Made], links: list[Link], start: int) -> bytes:
    infe, iloc, ipma = [], [], []
    properties: dict[bytes, int] = {}
    links, at = list(links), start
    spans_at = start + sum(len(one.content) for one in made)
    for number, (kind, own, content, spans) in enumerate(made, 1):
        size = len(content) or sum(end - first for first, end in spans)
        offset = at if content else spans_at
        iloc.append(_u16(number) + _u16(0) + _u16(1) + _u32(offset) + _u32(size))
        if content:
            at += size
            tiles = int.from_bytes(content[2:3], "big") + 1, int.from_bytes(content[3:4], "big") + 1
            links.append(
                (b"dimg", number, list(range(number + 1, number + 1 + tiles[0] * tiles[1])))
            )
        else:
            spans_at += size
        entry = _u16(number) + _u16(0) + kind + b"\x00"
        infe.append(_full_box(b"infe", entry, version=2, flags=int(number > 1)))  # 1: hidden
        indices = [properties.setdefault(each, len(properties) + 1) for each in own]
        essential = [0x8000 * (each[4:8] in CONFIGURATION.values()) for each in own]
        ipma.append(
            _u16(number)
            + bytes((len(own),))
            + b"".join(map(_u16, map(sum, zip(indices, essential, strict=True))))
        )
    iref = [
        _box(kind, _u16(source) + _u16(len(targets)) + b"".join(map(_u16, targets)))
        for kind, source, targets in links
    ]
    boxes = [
        _full_box(b"hdlr", _u32(0) + b"pict" + bytes(13)),
        _full_box(b"pitm", _u16(1)),
        _full_box(b"iloc", b"\x44\x00" + _u16(len(made)) + b"".join(iloc)),
        _full_box(b"iinf", _u16(len(made)) + b"".join(infe)),
        _full_box(b"iref", b"".join(iref)) if iref else b"",
        _box(
            b"iprp",
            _box(b"ipco", b"".join(properties))
            + _full_box(b"ipma", _u32(len(made)) + b"".join(ipma), flags=1),
        ),
    ]
    return _full_box(b"meta", b"".join(boxes))
