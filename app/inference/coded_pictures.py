"""The size of a coded picture by AV1 or HEVC itself, as its decoder will find it.

Read are the AV1 sequence header and the HEVC sequence parameter set, up to the size, and how many
pictures the data holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from app.errors import Unprocessable

Size = tuple[int, int]


class Bits:
    """Reads numbers of any number of bits, the highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._bits = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        """The next `count` bits as a number.

        Raises:
            IndexError: there are fewer.
        """
        self._left -= count
        if self._left < 0:
            raise IndexError("no bits are left")
        return self._bits >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An exponential Golomb code: of HEVC, and AV1's uvlc.

        Raises:
            IndexError: no bits are left.
            Unprocessable: more than 32 bits.
        """
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > MOST_ZEROS:
                raise Unprocessable("image has an invalid number in its codec's header")
        return (1 << zeros) - 1 + self.take(zeros)


MOST_ZEROS = 31


# -- AV1 --

SEQUENCE, DELIMITER, FRAME_HEADER, TILES, METADATA, FRAME, PADDING = 1, 2, 3, 4, 5, 6, 15
OBUS = frozenset((SEQUENCE, DELIMITER, FRAME_HEADER, TILES, METADATA, FRAME, PADDING))
SEQUENCE_BYTES = 64  # that can hold all up to the size


def av1_size(data: bytes, units: Iterator[int]) -> Size:
    """Width and height of the one frame of an AV1 image item.

    Args:
        data: the item.
        units: gives a number for each unit that may be read.

    Raises:
        IndexError: cut off.
        Unprocessable: not a single picture, or not an AV1 one.
    """
    sizes, frames = [], 0
    for kind, start, end in _obus(data, units):
        if kind == SEQUENCE:
            sizes.append(_sequence(Bits(data[start : min(end, start + SEQUENCE_BYTES)])))
        elif kind in (FRAME, FRAME_HEADER):
            frames += 1
    if len(sizes) != 1 or frames != 1:
        raise Unprocessable(
            f"AVIF has an item of {len(sizes)} sequence headers and {frames} frames; allowed: 1"
        )
    return sizes[0]


def _obus(data: bytes, units: Iterator[int]) -> Iterator[tuple[int, int, int]]:
    """Kind, start and end of each open bitstream unit."""
    at = 0
    while at < len(data):
        head, kind = data[at], data[at] >> 3 & 15
        if head & 0x80 or kind not in OBUS or next(units, None) is None:
            raise Unprocessable(f"AVIF has an AV1 unit of the kind {kind} too many")
        at += 1
        if head & 0x04:  # its layer
            if data[at]:
                raise Unprocessable("AVIF has a picture of several layers, not supported here")
            at += 1
        end = len(data)
        if head & 0x02:
            size, at = _leb128(data, at)
            end = at + size
        if end > len(data):
            raise Unprocessable("AVIF is cut off in its AV1 data")
        yield kind, at, end
        at = end


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            return value, at + i + 1
    raise Unprocessable("AVIF has an invalid size in its AV1 data")


def _sequence(bits: Bits) -> Size:
    """The largest frame that a sequence header allows; a frame is not larger than that."""
    bits.take(4)  # profile, still picture
    if bits.take(1):  # reduced header
        bits.take(5)
    else:
        delay = _timing(bits)
        display_delay = bits.take(1)
        if bits.take(5):
            raise Unprocessable("AVIF has a picture of several layers, not supported here")
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay and bits.take(1):
            bits.take(2 * delay + 1)
        if display_delay and bits.take(1):
            bits.take(4)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(width_bits) + 1, bits.take(height_bits) + 1


def _timing(bits: Bits) -> int:
    """Skip the timing; gives the bits of a buffer's delay, 0 for no decoder model."""
    if not bits.take(1):
        return 0
    bits.take(64)
    if bits.take(1):
        bits.golomb()
    if not bits.take(1):
        return 0
    delay = bits.take(5) + 1
    bits.take(42)
    return delay


# -- HEVC --

SPS, PARAMETER_SETS = 33, frozenset((32, 33, 34))
PICTURES = range(16, 22)  # kinds of slices of pictures that need no other picture
BESIDE = frozenset((35, 36, 37, 38, 39, 40))  # delimiters, ends, filler, messages
SUBSAMPLED = {0: (1, 1), 1: (2, 2), 2: (2, 1), 3: (1, 1)}
PROFILE_BITS, LEVEL_BITS = 88, 8
SET_BYTES = 256  # of a parameter set that can hold all up to the size
MOST_PADDING = 64  # pixels of the largest block, to which encoders pad


def hevc_configuration(config: bytes) -> tuple[Size, int]:
    """The size by a `hvcC` box's one sequence parameter set, and the bytes of a unit's length.

    Raises:
        IndexError: cut off.
        Unprocessable: several such sets, or an invalid one.
    """
    length_bytes = (config[21] & 3) + 1
    sizes, at = [], 23
    for _ in range(config[22]):
        kind = config[at] & 0x3F
        count, at = int.from_bytes(config[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = config[at] << 8 | config[at + 1]
            unit, at = config[at + 2 : at + 2 + size], at + 2 + size
            if at > len(config) or (unit[0] >> 1 & 0x3F) != kind or kind not in PARAMETER_SETS:
                raise Unprocessable("HEIC has an invalid hvcC box")
            if kind == SPS:
                sizes.append(_parameter_set(unit))
    if len(sizes) != 1 or at != len(config) or length_bytes == 3:
        raise Unprocessable("HEIC has an invalid hvcC box")
    return sizes[0], length_bytes


def check_hevc(data: bytes, length_bytes: int, units: Iterator[int]) -> None:
    """Check that the data are slices of one picture, which bring no other size.

    Args:
        data: the item.
        length_bytes: of the length before each unit.
        units: gives a number for each unit that may be read.

    Raises:
        IndexError: cut off.
        Unprocessable: they are not.
    """
    at = pictures = 0
    while at < len(data):
        start = at + length_bytes
        at = start + int.from_bytes(data[at:start], "big")
        kind = data[start] >> 1 & 0x3F
        layer = (data[start] & 1) << 5 | data[start + 1] >> 3
        if at > len(data):
            raise Unprocessable("HEIC is cut off in its HEVC data")
        known = kind in PICTURES or kind in BESIDE
        if layer or not known or at < start + 3 or next(units, None) is None:
            raise Unprocessable(f"HEIC has an HEVC unit of the kind {kind}, not supported here")
        if kind in PICTURES and data[start + 2] & 0x80:
            pictures += 1
    if pictures != 1:
        raise Unprocessable(f"HEIC has an item of {pictures} pictures; allowed: 1")


def _parameter_set(unit: bytes) -> Size:
    bits = Bits(unit[2:SET_BYTES].replace(b"\x00\x00\x03", b"\x00\x00"))
    bits.take(4)
    layers = bits.take(3)
    bits.take(1 + PROFILE_BITS + LEVEL_BITS)
    if layers:
        present = [(bits.take(1), bits.take(1)) for _ in range(8)][:layers]
        for profile, level in present:
            bits.take(PROFILE_BITS * profile + LEVEL_BITS * level)
    bits.golomb()
    chroma = bits.golomb()
    if chroma not in SUBSAMPLED or (chroma == 3 and bits.take(1)):
        raise Unprocessable("HEIC has colours that are not supported here")
    width, height = bits.golomb(), bits.golomb()
    if not bits.take(1):
        return width, height
    across, down = SUBSAMPLED[chroma]
    right = across * (bits.golomb() + bits.golomb())
    below = down * (bits.golomb() + bits.golomb())
    if max(right, below) > MOST_PADDING:
        raise Unprocessable(
            f"HEIC is padded by {right} x {below} pixels; allowed: {MOST_PADDING} x {MOST_PADDING}"
        )
    return width - right, height - below
