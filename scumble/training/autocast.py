"""Where networks compute in bfloat16."""

from __future__ import annotations

import torch


def fast_bfloat16(kind: str) -> bool:
    """Whether a type of device, such as `cpu`, computes in bfloat16 at full speed.

    Every GPU that torch supports does. A processor without AVX-512 BF16 or AMX emulates it, ten to
    twenty times as slowly as float32.
    """
    if kind != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(kind: str) -> torch.autocast:
    """A context in which layers compute in bfloat16 where that is fast, else in float32."""
    return torch.autocast(kind, torch.bfloat16, enabled=fast_bfloat16(kind))
