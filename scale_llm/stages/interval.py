"""How far a share that was measured on a sample may be from the true one."""

import math


def beside_chance(right: float, count: float, what: str) -> str:
    """Whether so many right ones of so many tell a model from a coin."""
    low, high = wilson_interval(right, count)
    found = f"{right:.0f} of {count:.0f} {what}, 95% interval {low:.3f} to {high:.3f}"
    if low > 0.5:
        return f"{found}: better than chance"
    if high < 0.5:
        return f"{found}: worse than chance; are better and worse the wrong way round?"
    needed = "more held-out rows (train.eval_iters, data.split) or a better model would tell"
    return f"{found}: not told apart from chance; {needed}"


def wilson_interval(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): chance is not excluded where it holds one half."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, z * z / count
    middle = share + square / 2
    spread = z * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (middle - spread) / (1 + square), (middle + spread) / (1 + square)
