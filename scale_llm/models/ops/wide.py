"""The type that sums and products are computed in."""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in FP32 where it is a 16-bit type, else x itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
