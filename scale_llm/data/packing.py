"""Whole sequences into rows of a fixed length: first-fit decreasing (Johnson 1973), the longest first, each into the
first row that has room. At most 11/9 of the fewest rows possible, and one in practice for the lengths of conversations.
"""

from collections.abc import Sequence

import numpy as np


def first_fit_decreasing(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Positions of the lengths in each row; no row holds more than `capacity`, none is empty.

    Equal lengths keep their order, so a shuffled list gives other rows each time. n log n in the number of lengths.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and int(sizes.max()) > capacity:
        raise ValueError(f"a sequence of {int(sizes.max())} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room = _Room(sizes.size, capacity)
    for position in np.argsort(-sizes, kind="stable").tolist():
        row = room.take(int(sizes[position]))
        if row == len(rows):
            rows.append([])
        rows[row].append(position)
    return rows


class _Room:
    """What is left in each row, as a tree of maxima: the first row with enough is found in log n steps."""

    def __init__(self, rows: int, capacity: int):
        self._leaves = 1
        while self._leaves < max(rows, 1):
            self._leaves *= 2
        self._most = [capacity] * (2 * self._leaves)

    def take(self, size: int) -> int:
        """The first row with `size` left, which it then has no more."""
        most, node = self._most, 1
        while node < self._leaves:
            node *= 2
            if most[node] < size:
                node += 1
        row = node - self._leaves
        most[node] -= size
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
        return row
