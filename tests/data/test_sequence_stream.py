"""Packing, and streams that hold every sequence once an epoch."""

import numpy as np
import pytest

from scale_llm.config.batch import settle_epochs, total_iterations, total_samples
from scale_llm.config.stage import Batching, SftConfig
from scale_llm.config.train import TrainConfig
from scale_llm.data.packing import first_fit_decreasing
from scale_llm.data.sequence_stream import WINDOW, PackedStream, SingleStream, filled

LENGTHS = np.random.default_rng(0).integers(3, 200, size=500)


def slow_first_fit_decreasing(lengths, capacity):
    """The definition: the longest first, each into the first row that has room."""
    rows, left = [], []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((i for i, room in enumerate(left) if room >= lengths[position]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(capacity)
        rows[row].append(position)
        left[row] -= lengths[position]
    return rows


@pytest.mark.parametrize("capacity", [199, 256, 1000, 10**6])
def test_packing_is_first_fit_decreasing(capacity):
    assert first_fit_decreasing(LENGTHS, capacity) == slow_first_fit_decreasing(LENGTHS.tolist(), capacity)


def test_packing_of_nothing_and_of_what_does_not_fit():
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="11 tokens"):
        first_fit_decreasing([3, 11], 10)


STREAMS = {
    "single": lambda **options: SingleStream(len(LENGTHS), seed=3, **options),
    "packed": lambda **options: PackedStream(LENGTHS, 512, seed=3, **options),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_every_epoch_holds_every_sequence_once(kind):
    """Across boundaries of epochs nothing is skipped or repeated; orders differ; the stream ends where it should."""
    stream = STREAMS[kind](end=3)
    bounds = [stream.samples_in(epoch) for epoch in range(4)]
    epochs = [
        [number for index in range(first, last) for number in stream.sample(index)]
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]
    assert all(sorted(epoch) == list(range(len(LENGTHS))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.sample(bounds[3]) == [] == stream.sample(bounds[3] + 100)


@pytest.mark.parametrize("kind", STREAMS)
def test_any_sample_is_found_at_once(kind):
    """A resumed run asks for a late sample first."""
    late = STREAMS[kind]().samples_in(5) + 7
    whole = STREAMS[kind]()
    for index in range(late):
        whole.sample(index)
    assert STREAMS[kind]().sample(late) == whole.sample(late)


def test_a_part_of_an_epoch():
    stream = STREAMS["packed"](end=1.5)
    half = stream.samples_in(1.5)
    assert stream.samples_in(1) < half < stream.samples_in(2)
    assert stream.sample(half - 1) and not stream.sample(half)


def test_packed_rows_hold_whole_sequences_and_are_full():
    stream = STREAMS["packed"]()
    rows = [stream.sample(index) for index in range(stream.samples_in(1))]
    assert max(LENGTHS[row].sum() for row in rows) <= 512
    assert stream.efficiency() > 0.98
    assert stream.efficiency() == LENGTHS.sum() / (512 * len(rows))


def test_packing_goes_window_by_window():
    """So a long data set is packed in pieces, and an epoch still holds everything once."""
    count = WINDOW + 1000
    stream = PackedStream(np.full(count, 10), 40, seed=0)
    seen = [number for index in range(stream.samples_in(1)) for number in stream.sample(index)]
    assert sorted(seen) == list(range(count))


def test_filled_tells_packing_from_padding():
    options = {"row_tokens": 512, "micro_batch_size": 4, "seed": 0}
    packed = filled(SftConfig(batching=Batching.packed), LENGTHS, **options)
    padded = filled(SftConfig(batching=Batching.padded), LENGTHS, **options)
    budget = filled(SftConfig(batching=Batching.token_budget), LENGTHS, **options)
    assert packed > 0.98 and budget > 0.93 and padded < 0.7


@pytest.mark.parametrize(("rampup", "samples"), [(None, 104), ([4, 2, 8], 98)])
def test_epochs_become_whole_batches(rampup, samples):
    """97 samples in batches of 8 are 13 steps, the last of which is partly empty; with ramp-up 4 + 6 + 11 * 8."""
    train = TrainConfig(global_batch_size=8, train_epochs=1.0, rampup_batch_size=rampup)
    settle_epochs(train, 97)
    assert total_samples(train) == samples and total_iterations(train) == 13
