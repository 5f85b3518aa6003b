"""How far a share that was measured on a sample may be from the true one."""

import math


def wilson_interval(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): chance is not excluded where it holds one half."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, z * z / count
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (middle - spread) / (1 + square), (middle + spread) / (1 + square)
