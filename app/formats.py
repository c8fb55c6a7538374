"""Image formats that are taken."""

from __future__ import annotations

# Content type -> Pillow's name of the format. Which of them a body is, its first bytes say.
FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
