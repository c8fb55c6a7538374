"""Image formats that are taken."""

from __future__ import annotations

import re

# Content type -> Pillow's name of the format. Which of them a body is, its first bytes say.
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}

# How a file of any of them begins.
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP", re.DOTALL)

# How files of other formats begin, to name them in an error.
OTHERS = {
    "AVIF": re.compile(rb".{4}ftypavi[fs]", re.DOTALL),
    "HEIC": re.compile(rb".{4}ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II\*\x00|MM\x00\*"),
    "BMP": re.compile(rb"BM.{4}\x00{4}", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00{3}\x0cJXL "),
}


def unsupported(data: bytes) -> str:
    """What is wrong with a file of none of the formats that are taken."""
    allowed = f"supported formats: {', '.join(FORMATS.values())}"
    for name, start in OTHERS.items():
        if start.match(data):
            return f"image is a file of the format {name}, which is not supported; {allowed}"
    return f"unsupported or corrupt image ({len(data)} bytes, starts with {data[:8]!r}); {allowed}"
