"""Micro-batches of whole sequences.

Sequence k has the tokens 100 (k + 1), 100 (k + 1) + 1, ..., so that a token says whose it is and where it stands, its
label is one more, and 0 is padding.

Shapes: b rows, s tokens of a row.
"""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from scale_llm.config.stage import Batching
from scale_llm.data.sequence_loader import SequenceLoader, Shape
from scale_llm.data.sequence_stream import PackedStream, SingleStream

LENGTHS = [4, 3, 17, 9, 25, 2, 12, 6, 30, 5, 8, 21, 11, 14, 7, 19, 3, 28, 10, 16, 23, 13, 4, 9]
ROW = 32
BUDGET = 50


@dataclass(frozen=True, slots=True)
class Piece:
    tokens: np.ndarray
    trained: np.ndarray
    weight: float


class Pieces:
    """Sequences of the lengths; about half of the tokens count, those of every fifth sequence 2.5 times."""

    def __init__(self, lengths=LENGTHS):
        self.lengths = np.array(lengths)

    def __getitem__(self, index: int) -> Piece:
        length = int(self.lengths[index])
        trained = np.random.default_rng(index).random(length) < 0.5
        trained[0] = trained[1] = True
        return Piece(100 * (index + 1) + np.arange(length), trained, 2.5 if index % 5 == 0 else 1.0)


class Listed:
    """A stream of these samples, none after them."""

    def __init__(self, *samples):
        self._samples = samples

    def sample(self, index):
        return self._samples[index] if index < len(self._samples) else []

    def samples_in(self, epochs):
        return len(self._samples)


def shape_of(batching, **options):
    """A shape whose row or budget holds any of the sequences."""
    return Shape(batching=Batching(batching), row_tokens=ROW, budget=BUDGET, **options)


def micro_batches(shape, *, stream=None, size=24, start=0, ranks=1, pieces=None):
    """Every data-parallel rank's micro-batches of one global batch."""
    pieces = pieces or Pieces()
    stream = stream or stream_for(shape)
    loaders = [
        SequenceLoader(pieces, stream, shape, data_parallel_rank=rank, data_parallel_size=ranks)
        for rank in range(ranks)
    ]
    return [loader.global_batch(start, size) for loader in loaders]


def stream_for(shape, end=1.0):
    if shape.batching is Batching.packed:
        places = np.array(LENGTHS) - (0 if shape.whole else 1)
        return PackedStream(places, ROW, seed=1, end=end)
    return SingleStream(len(LENGTHS), seed=1, end=end)


def numbers_in(batch):
    """The sequences of a micro-batch, each as often as it begins."""
    tokens, positions = batch["tokens"], batch["position_ids"]
    return (tokens[(tokens > 0) & (positions == 0)] // 100 - 1).tolist()


def equal(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in zip(first, second, strict=True)
    )


BATCHINGS = ["packed", "padded", "token_budget"]


def test_two_sequences_in_a_row_by_hand():
    """The last token of each has no place, and the first of the second is nobody's label."""
    shape = Shape(batching=Batching.packed, row_tokens=8, numbered=True)
    ((batch,),) = micro_batches(shape, stream=Listed([0, 1]), size=1)
    weights = np.array([2.5, 1.0])
    first, second = (Pieces()[number].trained[1:] * weights[number] for number in (0, 1))
    assert batch["tokens"].tolist() == [[100, 101, 102, 200, 201, 0, 0, 0]]
    assert batch["labels"].tolist() == [[101, 102, 103, 201, 202, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[*first, *second, 0, 0, 0]]
    assert batch["boundaries"].tolist() == [0, 3, 5]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert batch["numbers"].tolist() == [0, 1]
    types = {name: tensor.dtype for name, tensor in batch.items()}
    assert types.pop("boundaries") is torch.int32 and types.pop("loss_mask") is torch.float32
    assert batch["sequence_weights"].tolist() == weights.tolist() and types.pop("sequence_weights") is torch.float32
    assert set(types.values()) == {torch.int64}


def test_padding_between_joined_rows_is_a_sequence_of_its_own():
    """Attention must not take it for the first tokens of the next row; after the last row nothing follows it. A full
    row has none, a row without a sample is nothing else."""
    shape = Shape(batching=Batching.packed, row_tokens=5, micro_batch_size=5, numbered=True)
    pieces = Pieces([4, 3, 6, 3])
    ((batch,),) = micro_batches(shape, stream=Listed([0], [], [1, 3], [2], [1]), size=5, pieces=pieces)
    assert batch["tokens"].shape == (1, 25)
    assert batch["boundaries"].tolist() == [0, 3, 5, 10, 12, 14, 15, 20, 22]
    assert batch["numbers"].tolist() == [0, 1, 3, 2, 1]
    assert batch["segments"][0].tolist() == [
        0, 0, 0, -1, -1, -1, -1, -1, -1, -1, 1, 1, 2, 2, -1, 3, 3, 3, 3, 3, 4, 4, -1, -1, -1,
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_place_holds_what_it_should(batching, micro_batch_size, ranks):
    """A place has its sequence's token, the next one as label, the label's weight and its position; each sequence of
    the global batch is on one rank, in one micro-batch, whole but for its last token."""
    pieces = Pieces()
    held = []
    for batch in sum(micro_batches(shape_of(batching, micro_batch_size=micro_batch_size), ranks=ranks), []):
        tokens, mask = batch["tokens"], batch["loss_mask"]
        padding = tokens == 0
        assert batch["labels"].equal(torch.where(padding, 0, tokens + 1))
        assert batch["position_ids"].equal(tokens % 100)
        assert not mask[padding].any()
        numbers = numbers_in(batch)
        for number in numbers:
            places = mask[tokens // 100 - 1 == number]
            piece = pieces[number]
            assert places.tolist() == (piece.trained[1:] * np.float32(piece.weight)).tolist()
        held += numbers
        ends = np.cumsum([len(pieces[number].tokens) - 1 for number in numbers])
        if batching == "token_budget":
            assert batch["boundaries"].tolist() == [0, *ends]
        elif batching == "packed":
            begins = torch.nonzero((batch["position_ids"] == 0)[0] & ~padding[0]).flatten().tolist()
            assert set(begins) | {0} <= set(batch["boundaries"].tolist())
        else:
            assert "boundaries" not in batch and len(tokens) == max(len(numbers), 1)
        assert "segments" not in batch and "numbers" not in batch
    assert sorted(held) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("start", [0, 12])
def test_ranks_together_hold_the_same_for_any_data_parallel_size(batching, start):
    """Single samples, so that a global batch of 12 of the 24 (or of the rows) is the same set on 1 to 6 ranks; ranks
    have equally many micro-batches, or a collective would wait for ever."""
    shape = shape_of(batching)
    stream = stream_for(shape, end=3)
    wanted = sorted(number for index in range(start, start + 12) for number in stream.sample(index))
    for ranks in (1, 2, 3, 4, 6):
        found = micro_batches(shape, stream=stream, size=12, start=start, ranks=ranks)
        assert sorted(n for batches in found for batch in batches for n in numbers_in(batch)) == wanted
        assert len({len(batches) for batches in found}) == 1


@pytest.mark.parametrize(("batching", "each"), [("packed", [[0, 1], [4, 5], [8, 9]]), ("padded", [[0, 1], [4, 5]])])
def test_micro_batches_go_to_ranks_in_turn(batching, each):
    """Sample i is in the same global micro-batch whatever the number of ranks: rank 0 of 2 has every other two."""
    stream = Listed(*([number] for number in range(12)))
    found = micro_batches(
        shape_of(batching, micro_batch_size=2), stream=stream, size=4 * len(each), ranks=2, pieces=Pieces()
    )
    assert [numbers_in(batch) for batch in found[0]] == each
    assert [numbers_in(batch) for batch in found[1]] == [[number + 2 for number in two] for two in each]


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_global_batch_that_cannot_be_dealt_out_is_refused(batching):
    with pytest.raises(AssertionError, match="6 is no multiple of 4"):
        micro_batches(shape_of(batching, micro_batch_size=2), size=6, ranks=2)


@pytest.mark.parametrize("rows_multiple", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_budget_of_tokens(ranks, rows_multiple):
    """No row has more tokens than the budget, no more rows than must be, each rank a multiple of rows_multiple; ranks
    have rows of like size in each turn, the fullest first."""
    found = micro_batches(shape_of("token_budget", rows_multiple=rows_multiple), ranks=ranks)
    tokens = [[int((batch["tokens"] > 0).sum()) for batch in batches] for batches in found]
    assert max(map(max, tokens)) <= BUDGET
    assert all(batch["tokens"].shape[0] == 1 for batches in found for batch in batches)
    in_turn = [count for turn in zip(*tokens, strict=True) for count in turn]
    assert in_turn == sorted(in_turn, reverse=True)
    needed = sum(count > 0 for count in in_turn)
    assert needed == -(-(sum(LENGTHS) - len(LENGTHS)) // BUDGET), "the lengths fit that well"
    unit = ranks * rows_multiple
    assert len(in_turn) == -(-needed // unit) * unit


def test_a_sequence_beyond_the_budget_is_refused():
    shape = Shape(batching=Batching.token_budget, row_tokens=ROW, budget=28)
    with pytest.raises(ValueError, match="29 tokens"):
        micro_batches(shape)


@pytest.mark.parametrize("multiple", [1, 8, 12])
@pytest.mark.parametrize("batching", ["padded", "token_budget"])
def test_rows_are_as_short_as_the_multiple_allows(batching, multiple):
    (batches,) = micro_batches(shape_of(batching, micro_batch_size=3, multiple=multiple))
    for batch in batches:
        width, longest = batch["tokens"].shape[1], int((batch["tokens"] > 0).sum(1).max())
        assert width % multiple == 0 and longest <= width < longest + multiple


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_uniform_gives_one_shape(batching, multiple):
    """Pipeline stages exchange tensors of a shape that they know: also where samples have several sequences and where
    the stream ends within the batch. The sequences remain the same."""
    samples = [[number, number + 12] for number in range(11)]
    shapes = {}
    for uniform in (False, True):
        shape = Shape(batching=Batching(batching), row_tokens=64, budget=64, micro_batch_size=3, multiple=multiple,
                      uniform=uniform)  # fmt: skip
        (batches,) = micro_batches(shape, stream=Listed(*samples), size=15)
        shapes[uniform] = {tuple(batch["tokens"].shape) for batch in batches}
        assert sorted(sum(map(numbers_in, batches), [])) == sorted(sum(samples, []))
    assert len(shapes[True]) == 1 and all(width % multiple == 0 for _, width in shapes[True])
    if batching != "packed":
        assert len(shapes[False]) > 1, "else this shows nothing"


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("whole", [False, True])
def test_numbered_places(batching, whole):
    """Each place's sequence by way of `numbers` is the one its token is of; padding has none; the numbers come in the
    order of their places, so that segment n is the sequence that begins n-th."""
    shape = shape_of(batching, micro_batch_size=3, numbered=True, whole=whole)
    for batch in micro_batches(shape)[0]:
        tokens, segments, numbers = batch["tokens"], batch["segments"], batch["numbers"]
        assert segments.shape == tokens.shape
        assert numbers.tolist() == numbers_in(batch)
        assert (segments[tokens == 0] == -1).all()
        kept = tokens > 0
        assert numbers[segments[kept]].equal(tokens[kept] // 100 - 1)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_whole_sequences_are_judged_at_the_last_token_that_counts(batching):
    """All tokens have a place; the mask is 1 there alone, whatever the weight; there are no labels."""
    pieces, held = Pieces(), []
    shape = shape_of(batching, micro_batch_size=3, whole=True)
    for batch in micro_batches(shape)[0]:
        tokens = batch["tokens"]
        for number in numbers_in(batch):
            here = tokens // 100 - 1 == number
            wanted = np.zeros(len(pieces[number].tokens))
            wanted[np.flatnonzero(pieces[number].trained).max()] = 1
            assert tokens[here].tolist() == pieces[number].tokens.tolist()
            assert batch["loss_mask"][here].tolist() == wanted.tolist()
            held.append(number)
        assert batch["position_ids"].equal(tokens % 100)
        assert not batch["labels"].any() and not batch["loss_mask"][tokens == 0].any()
        if batching == "token_budget":
            assert batch["boundaries"].tolist() == [0, *np.cumsum(pieces.lengths[numbers_in(batch)])]
            assert batch["boundaries"][-1] <= BUDGET
    assert sorted(held) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("whole", "size"), [(False, 24), (True, 24), (False, 6)])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_tokens_of_a_global_batch(batching, whole, size, ranks):
    """Over all ranks, whichever is asked, without padding."""
    shape = shape_of(batching, whole=whole)
    stream = stream_for(shape)
    found = micro_batches(shape, stream=stream, size=size, ranks=ranks)
    counted = sum(int((batch["tokens"] > 0).sum()) for batches in found for batch in batches)
    for rank in range(ranks):
        loader = SequenceLoader(Pieces(), stream, shape, data_parallel_rank=rank, data_parallel_size=ranks)
        assert loader.tokens_in(0, size) == counted


@pytest.mark.parametrize("present", [5, 0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_after_the_streams_end_samples_are_empty(batching, uniform, ranks, present):
    """The last global batch holds what is left; ranks still have equally many micro-batches, none without a place, and
    nothing in an empty one counts."""
    shape = shape_of(batching, micro_batch_size=2, multiple=8, uniform=uniform, numbered=True)
    stream = Listed(*([number] for number in range(present)))
    found = micro_batches(shape, stream=stream, size=12, ranks=ranks)
    assert len({len(batches) for batches in found}) == 1
    every = sum(found, [])
    assert sorted(sum(map(numbers_in, every), [])) == list(range(present))
    for batch in every:
        assert batch["tokens"].numel() >= 8
        if not numbers_in(batch):
            assert not batch["tokens"].any() and not batch["loss_mask"].any()
            assert (batch["segments"] == -1).all() and not len(batch["numbers"])
            if batching == "token_budget":
                assert batch["boundaries"].tolist() == [0]
    assert any(not numbers_in(batch) for batch in every) or (batching == "token_budget" and present)
    empty_steps = micro_batches(shape, stream=stream, size=12, start=36, ranks=ranks)
    assert all(batches and not sum(map(numbers_in, batches), []) for batches in empty_steps)


POSITIONS = [(0, 4), (4, 4), (8, 4), (12, 8), (20, 8), (4, 4), (8, 4), (40, 4), (40, 4), (44, 4)]
"""In order, with a larger batch (ramp-up), back, far ahead, the same again, and on."""


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_batch_made_ahead_is_the_batch_made_when_asked(batching):
    shape = shape_of(batching, micro_batch_size=2)
    plain, ahead = (
        SequenceLoader(Pieces(), stream_for(shape, end=4), shape, data_parallel_rank=1, data_parallel_size=2,
                       num_workers=workers)
        for workers in (0, 1)
    )  # fmt: skip
    try:
        for start, size in POSITIONS:
            assert equal(ahead.global_batch(start, size), plain.global_batch(start, size)), (start, size)
    finally:
        ahead.close()


class Watched(Listed):
    """A stream that notes who asks, and when sample 4 has been asked for."""

    def __init__(self):
        super().__init__(*([number] for number in range(24)))
        self.threads, self.reached = set(), threading.Event()

    def sample(self, index):
        self.threads.add(threading.get_ident())
        if index == 4:
            self.reached.set()
        return super().sample(index)


def watched_loader(stream, workers):
    shape = shape_of("padded")
    return SequenceLoader(Pieces(), stream, shape, data_parallel_rank=0, data_parallel_size=1, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_batch_is_made_while_this_one_trains(workers):
    stream = Watched()
    loader = watched_loader(stream, workers)
    try:
        loader.global_batch(0, 4)
        assert stream.reached.wait(10 if workers else 0) == bool(workers)
    finally:
        loader.close()


def test_one_thread_alone_makes_batches():
    """Streams find out where epochs begin as they go: two threads at once would enter an epoch twice. After a jump the
    batch that nobody wants any more may still be in the making."""
    stream = Watched()
    loader = watched_loader(stream, 1)
    try:
        for start, size in [(0, 4), (12, 4), (4, 4), (8, 8)]:
            loader.global_batch(start, size)
    finally:
        loader.close()
    assert len(stream.threads) == 1
