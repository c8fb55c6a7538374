"""ICC profiles made up for tests: three primaries and one gamma."""

from __future__ import annotations

import struct

# Columns are the primaries' XYZ, adapted to D50.
SRGB_D50 = (
    (0.4360747, 0.3850649, 0.1430804),
    (0.2225045, 0.7168786, 0.0606169),
    (0.0139322, 0.0971045, 0.7141733),
)
# Display P3, what phones write.
WIDE = (
    (0.5151, 0.2920, 0.1571),
    (0.2412, 0.6922, 0.0666),
    (-0.0011, 0.0419, 0.7841),
)


def matrix_profile(matrix: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A display profile, version 2, of RGB by a matrix."""
    fixed = lambda value: round(value * 65536)  # noqa: E731  # s15Fixed16Number
    xyz = lambda x, y, z: b"XYZ \0\0\0\0" + struct.pack(">3i", fixed(x), fixed(y), fixed(z))  # noqa: E731
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    text = b"text\0\0\0\0made up\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {
        b"desc": description,
        b"cprt": text,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **{
            name: xyz(*(row[i] for row in matrix))
            for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
        },
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12x4s40x", at + len(body), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ",
        b"XYZ ", b"acsp",
    )[:84]  # fmt: skip
    header = header[:68] + struct.pack(">3i", fixed(0.9642), fixed(1.0), fixed(0.8249))
    return header.ljust(128, b"\0") + table + body
