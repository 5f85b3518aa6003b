"""Who sends which part of which tensor to whom, when a model on one layout is copied to another. No torch.

Every rank makes the same plan from the same descriptions of all ranks' shards. Ranks are positions in the group that
the movement goes over.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from scale_llm.config.errors import UserError

ALIGNMENT = 16
"""Bytes; every part in a buffer begins at a multiple of it, as each element type needs."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a whole tensor: where it begins on every axis, and how long it is there."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def intersection(self, other: "Box") -> "Box | None":
        """What both hold; None: nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = [min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)]
        shape = tuple(end - first for end, first in zip(ends, start, strict=True))
        return Box(start, shape) if min(shape, default=1) > 0 else None

    def parts(self, most: int) -> Iterator["Box"]:
        """Cut along its first axes in parts of at most `most` elements."""
        axis = next((axis for axis, length in enumerate(self.shape) if length > 1), None)
        if self.size <= most or axis is None:
            yield self
            return
        rows = max(1, most // (self.size // self.shape[axis]))
        for first in range(0, self.shape[axis], rows):
            start, shape = list(self.start), list(self.shape)
            start[axis] += first
            shape[axis] = min(rows, self.shape[axis] - first)
            yield from Box(tuple(start), tuple(shape)).parts(most)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Where it is in an array that holds the outer box."""
        offsets = [own - first for own, first in zip(self.start, outer.start, strict=True)]
        return tuple(slice(offset, offset + length) for offset, length in zip(offsets, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds of one tensor. rows_vary: the first axis is padded by each layout in its own way."""

    name: str
    box: Box
    whole: tuple[int, ...]
    dtype: str
    item_bytes: int
    rows_vary: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A part that goes from one shard to another, each named by its rank and its number there."""

    name: str
    box: Box
    source: tuple[int, int]
    target: tuple[int, int]
    bytes: int

    @property
    def room(self) -> int:
        """Bytes that it takes in a buffer."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class Plan:
    """buckets: what goes between ranks, in the order of sending; in each, parts are ordered by target, then source.
    local: what stays on a rank. whole: name -> the part of a tensor that both layouts have. Rows of a target beyond it
    are padding that the source has not; they become 0."""

    buckets: list[list[Part]] = field(default_factory=list)
    local: list[Part] = field(default_factory=list)
    whole: dict[str, Box] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        """Between ranks, over the whole job."""
        return sum(part.bytes for bucket in self.buckets for part in bucket)

    @property
    def total_bytes(self) -> int:
        """The same with what stays on its rank."""
        return self.sent_bytes + sum(part.bytes for part in self.local)


def make_plan(
    sources: Sequence[Sequence[Shard]], targets: Sequence[Sequence[Shard]], *, vocab_size: int, bucket_bytes: int,
    ranks_per_node: int | None = None,
) -> Plan:  # fmt: skip
    """sources, targets: the shards of every rank. vocab_size: rows that a padded vocabulary needs at least.
    bucket_bytes: what a rank sends and receives of one bucket together. ranks_per_node: so many ranks, one behind the
    other, share a node, between which a part goes only where the node holds it not; None: all do.

    Raises:
        UserError: the models differ, or no rank holds some part of a tensor; with the names of all such tensors.
    """
    plan = Plan(whole=_whole(sources, targets, vocab_size))
    single = _single_axes([*sources, *targets])
    holders, wanted = _by_place(sources, plan.whole, single), _by_place(targets, plan.whole, single)
    sent = [0] * len(sources)
    problems: dict[str, str] = {}
    parts: list[Part] = []
    for place, pieces in wanted.items():
        name = place[0]
        boxes = _replicas(holders.get(place, []))
        for target, shard, box in pieces:
            found = [(common, ranks) for held, ranks in boxes.items() if (common := box.intersection(held)) is not None]
            if not _covers(box, [common for common, _ in found]):
                problems[name] = f"{name}: the source's shards do not cover {box} of the target exactly once"
                continue
            for common, ranks in found:
                part = _part(shard, common, ranks, target, sent, ranks_per_node or len(sources))
                (plan.local if part.source[0] == part.target[0] else parts).append(part)
    if problems:
        raise UserError([f"moving weights: {text}" for text in problems.values()])
    plan.buckets = _in_buckets(parts, bucket_bytes)
    return plan


def owned(shards: Sequence[Sequence[Shard]]) -> set[tuple[int, int]]:
    """One (rank, number) for every different box, so that together they hold every element once."""
    first: dict[tuple[str, Box], tuple[int, int]] = {}
    for rank, mine in enumerate(shards):
        for number, shard in enumerate(mine):
            first.setdefault((shard.name, shard.box), (rank, number))
    return set(first.values())


def _whole(sources, targets, vocab_size: int) -> dict[str, Box]:
    """Of every tensor the part that both sides have; checks that both have the same tensors."""
    ours, theirs = _shapes(sources), _shapes(targets)
    problems = [f"{name}: the target has no such tensor" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"{name}: the source has no such tensor" for name in sorted(theirs.keys() - ours.keys())]
    whole = {}
    for name in sorted(ours.keys() & theirs.keys()):
        shape, varies = ours[name]
        other, _ = theirs[name]
        common = tuple(map(min, shape, other))
        fits = len(shape) == len(other) and (shape == other or (varies and shape[1:] == other[1:]))
        if not fits or (varies and common[0] < vocab_size):
            problems.append(f"{name}: shape {shape} at the source and {other} at the target")
        whole[name] = Box((0,) * len(common), common)
    if problems:
        raise UserError([f"moving weights: {problem}; both must be the same model" for problem in problems])
    return whole


def _shapes(shards) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {shard.name: (shard.whole, shard.rows_vary) for mine in shards for shard in mine}


Piece = tuple[tuple[int, int], Shard, Box]
"""(rank, number), the shard, and what of it is in the whole tensor."""


def _single_axes(shards: Sequence[Sequence[Shard]]) -> dict[str, int]:
    """How many of a tensor's first axes every shard has but one place of: layers, experts."""
    found: dict[str, int] = {}
    for shard in (shard for mine in shards for shard in mine):
        count = next((axis for axis, length in enumerate(shard.box.shape) if length != 1), len(shard.box.shape))
        found[shard.name] = min(count, found.get(shard.name, count))
    return found


def _by_place(
    shards: Sequence[Sequence[Shard]], whole: dict[str, Box], single: dict[str, int]
) -> dict[tuple, list[Piece]]:
    """Pieces by name and place on the single axes: no other ones can have anything in common."""
    found = defaultdict(list)
    for rank, mine in enumerate(shards):
        for number, shard in enumerate(mine):
            box = shard.box.intersection(whole[shard.name])
            if box is not None:
                found[shard.name, box.start[: single[shard.name]]].append(((rank, number), shard, box))
    return dict(sorted(found.items(), key=lambda item: item[0]))


def _replicas(pieces: list[Piece]) -> dict[Box, list[tuple[int, int]]]:
    """Different boxes and who holds each."""
    boxes = defaultdict(list)
    for holder, _, box in pieces:
        boxes[box].append(holder)
    return boxes


def _covers(box: Box, parts: list[Box]) -> bool:
    """Whether the parts, which lie within the box, fill it without overlapping."""
    apart = all(a.intersection(b) is None for i, a in enumerate(parts) for b in parts[:i])
    return apart and sum(part.size for part in parts) == box.size


def _part(
    shard: Shard, box: Box, holders: list[tuple[int, int]], target: tuple[int, int], sent: list[int], per_node: int
) -> Part:
    """From the rank itself where it holds the box, else from the holder on its node, else from any, that has sent
    least."""
    own = [holder for holder in holders if holder[0] == target[0]]
    node = target[0] // per_node
    source = own[0] if own else min(holders, key=lambda holder: (holder[0] // per_node != node, sent[holder[0]]))
    count = box.size * shard.item_bytes
    if not own:
        sent[source[0]] += count
    return Part(shard.name, box, source, target, count)


def _in_buckets(parts: list[Part], bucket_bytes: int) -> list[list[Part]]:
    """Every part goes in the first bucket that has room on both of its ranks; what a rank has filled to four fifths is
    not looked at again."""
    buckets: list[list[Part]] = []
    used: dict[tuple[int, int], int] = defaultdict(int)  # (bucket, rank) -> bytes
    first: dict[int, int] = defaultdict(int)  # rank -> the first bucket with room
    for part in _cut(parts, bucket_bytes):
        ranks = (part.source[0], part.target[0])
        number = max(first[rank] for rank in ranks)
        while any(used[number, rank] and used[number, rank] + part.room > bucket_bytes for rank in ranks):
            number += 1
        for rank in ranks:
            used[number, rank] += part.room
            while used[first[rank], rank] > 0.8 * bucket_bytes:
                first[rank] += 1
        buckets += [[] for _ in range(len(buckets), number + 1)]
        buckets[number].append(part)
    for bucket in buckets:
        bucket.sort(key=lambda part: (part.target[0], part.source[0]))
    return buckets


def _cut(parts: list[Part], bucket_bytes: int) -> Iterator[Part]:
    for part in parts:
        item = part.bytes // part.box.size
        for box in part.box.parts(max(1, bucket_bytes // item)):
            yield Part(part.name, box, part.source, part.target, box.size * item)
