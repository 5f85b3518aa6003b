"""The plan of a movement, without any ranks: what it refuses, how it shares the work and fills buckets."""

import pytest

from scale_llm.config.errors import UserError
from scale_llm.engine.movement_plan import Box, Shard, make_plan, owned

WHOLE = (4, 6, 10)


def shard(start, shape, *, whole=WHOLE, name="w", rows_vary=False) -> Shard:
    return Shard(name, Box(start, shape), whole, "float32", 4, rows_vary)


def halves(axis: int) -> list[list[Shard]]:
    """Two ranks, each with half of every layer along an axis."""
    found: list[list[Shard]] = [[], []]
    for layer in range(WHOLE[0]):
        for rank in range(2):
            start, shape = [layer, 0, 0], [1, *WHOLE[1:]]
            shape[axis] //= 2
            start[axis] += rank * shape[axis]
            found[rank].append(shard(tuple(start), tuple(shape)))
    return found


def plan(sources, targets, bucket_bytes=1 << 20, vocab_size=0, **options):
    return make_plan(sources, targets, vocab_size=vocab_size, bucket_bytes=bucket_bytes, **options)


def test_box_is_cut_into_parts_that_fill_it():
    box = Box((1, 2, 3), (3, 5, 7))
    for most in (1, 4, 7, 20, 36, 105, 1000):
        parts = list(box.parts(most))
        assert max(part.size for part in parts) <= most
        assert sum(part.size for part in parts) == box.size
        assert all(box.intersection(part) == part for part in parts)
        assert not any(a.intersection(b) for i, a in enumerate(parts) for b in parts[:i])


def test_every_element_of_every_target_comes_once():
    """Rows to columns, on the same two ranks and on others; with buckets of a few elements too."""
    for idle in ([], [[], []]):
        for bucket_bytes in (1 << 20, 100):
            found = plan([*halves(1), *idle], [*idle, *halves(2)], bucket_bytes)
            seen: dict[tuple[int, int], int] = {}
            for part in [*found.local, *(part for bucket in found.buckets for part in bucket)]:
                seen[part.target] = seen.get(part.target, 0) + part.box.size
            assert len(seen) == 8 and set(seen.values()) == {30}
            assert found.total_bytes == 4 * 240
            assert found.sent_bytes == (4 * 240 if idle else 4 * 120)


def test_nothing_goes_to_another_node_that_this_one_has():
    """Two nodes with a whole replica each, cut over their two ranks: each becomes two whole models by itself."""
    whole = [shard((layer, 0, 0), (1, 6, 10)) for layer in range(4)]
    found = plan(halves(1) * 2, [whole] * 4, ranks_per_node=2)
    parts = [part for bucket in found.buckets for part in bucket]
    assert parts and all(part.source[0] // 2 == part.target[0] // 2 for part in parts)


def test_work_is_shared_by_replicas():
    """Four replicas give to four ranks elsewhere: each sends a quarter."""
    whole = [shard((layer, 0, 0), (1, 6, 10)) for layer in range(4)]
    found = plan([whole] * 4 + [[]] * 4, [[]] * 4 + [whole] * 4)
    sent = [sum(part.bytes for bucket in found.buckets for part in bucket if part.source[0] == r) for r in range(8)]
    assert sent == [960, 960, 960, 960, 0, 0, 0, 0]


def test_bucket_is_bounded_on_every_rank():
    found = plan([*halves(1), [], []], [[], [], *halves(2)], bucket_bytes=200)
    assert len(found.buckets) == 3, "each rank has 480 bytes"
    for bucket in found.buckets:
        for rank in range(4):
            assert sum(part.room for part in bucket if rank in (part.source[0], part.target[0])) <= 200 + 16


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        ([shard((0, 0, 0), (4, 6, 5))], [shard((0, 0, 0), WHOLE)], "do not cover"),
        ([shard((0, 0, 0), WHOLE), shard((0, 0, 0), (4, 6, 5))], [shard((0, 0, 0), WHOLE)], "do not cover"),
        ([shard((0, 0, 0), WHOLE)], [shard((0, 0, 0), WHOLE, name="v")], "has no such tensor"),
        ([shard((0,), (9,), whole=(9,))], [shard((0,), (8,), whole=(8,))], "shape"),
        ([shard((0,), (9,), whole=(9,), rows_vary=True)], [shard((0,), (7,), whole=(7,), rows_vary=True)], "shape"),
    ],
)
def test_refusals_name_the_tensor(source, target, problem):
    with pytest.raises(UserError, match=f"moving weights: [wv]: .*{problem}"):
        plan([source], [target], vocab_size=8)


def test_padding_of_a_vocabulary_may_differ():
    source, target = shard((0,), (9,), whole=(9,), rows_vary=True), shard((0,), (12,), whole=(12,), rows_vary=True)
    assert plan([[source]], [[target]], vocab_size=8).total_bytes == 36
    assert plan([[target]], [[source]], vocab_size=8).total_bytes == 36


def test_replicas_are_counted_once():
    assert owned([[shard((0,), (4,)), shard((4,), (4,))], [shard((4,), (4,))]]) == {(0, 0), (0, 1)}
