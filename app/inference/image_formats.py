"""Image formats that are taken."""

from __future__ import annotations

import re
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path


def has_part(package: str, name: str) -> bool:
    """Whether a package has a compiled part; the supervisor must not import it."""
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    files = (Path(folder, name + suffix) for folder in folders for suffix in EXTENSION_SUFFIXES)
    return any(file.exists() for file in files)


# Content type -> Pillow's name of the format. Which of them a body is, its first bytes say.
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
# Those that need more than is always installed -> whether it is.
OPTIONAL = {
    "AVIF": (("image/avif",), has_part("PIL", "_avif")),
    "HEIF": (("image/heic", "image/heif"), find_spec("pillow_heif") is not None),
}
for _name, (_types, _installed) in OPTIONAL.items():
    if _installed:
        FORMATS |= dict.fromkeys(_types, _name)

BOXES = {
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIC": rb".{4}ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)",
}
# How a file of any of them begins.
SIGNATURE = re.compile(
    b"|".join((rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP", *BOXES.values())), re.DOTALL
)

# How files of other formats begin, to name them in an error.
OTHERS = {
    **{name: re.compile(start, re.DOTALL) for name, start in BOXES.items()},
    "GIF": re.compile(rb"GIF8[79]a"),
    "TIFF": re.compile(rb"II\*\x00|MM\x00\*"),
    "BMP": re.compile(rb"BM.{4}\x00{4}", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00{3}\x0cJXL "),
}
BOXED = re.compile(b"|".join(BOXES.values()), re.DOTALL)
NEEDS = {"AVIF": "Pillow 11.3 or newer with AVIF", "HEIC": "the package pillow-heif"}


def unsupported(data: bytes) -> str:
    """What is wrong with a file of none of the formats that are taken."""
    allowed = f"supported formats: {', '.join(dict.fromkeys(FORMATS.values()))}"
    for name, start in OTHERS.items():
        if start.match(data):
            needs = f" without {NEEDS[name]}" if name in NEEDS else ""
            return f"image is a file of the format {name}, which is not supported{needs}; {allowed}"
    return f"unsupported or corrupt image ({len(data)} bytes, starts with {data[:8]!r}); {allowed}"
