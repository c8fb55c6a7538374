"""Image formats that are taken."""

from __future__ import annotations

import re

# Content type -> Pillow's name of the format. Which of them a body is, its first bytes say.
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}

# How a file of any of them begins.
SIGNATURE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP", re.DOTALL)
