"""Cutting a tensor into parts of rows that stay in cache."""

from collections.abc import Iterator

import torch

PART_ELEMENTS = 1 << 18
"""Elements of one part: 1 MiB in FP32, so that two or three of them fit the second-level caches of two cores."""


def parts(rows: int, width: int) -> Iterator[slice]:
    """Slices of at most PART_ELEMENTS elements that cover `rows` rows of `width` elements."""
    step = max(1, PART_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """FP32 for 16-bit types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)
