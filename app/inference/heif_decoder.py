"""Registers pillow-heif, with which Pillow reads HEIC files, where it is installed."""

from __future__ import annotations

import pillow_heif

# Workers are as many as there are cores: one thread each. A file has no thumbnails here.
pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
