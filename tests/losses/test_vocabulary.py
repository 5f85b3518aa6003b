"""Functions of logits whose vocabulary is cut over ranks, against the full softmax in float64.

The vocabulary is padded to 256: 250 leaves a padded end on the last rank, 60 leaves ranks with nothing but padding.
"""

import pytest

LOG_PROBS = "support.losses:log_probs"
ENTROPY = "support.losses:entropy"
CROSS_ENTROPY = "support.losses:cross_entropy"


def assert_equal(results, gradient=1e-6):
    for result in results:
        assert result["value_error"] < 1e-6
        assert result["gradient_error"] < gradient
        assert result["padding_gradient"] == 0.0
        assert result["logits_unchanged"]
        assert result["dtype"] == "torch.float32"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [256, 250, 60])
@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY])
def test_values_and_gradients(ranks, function, vocab_size, world_size):
    assert_equal(ranks(world_size, function, vocab_size=vocab_size, dtype="float32"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY])
def test_temperature(ranks, function, temperature, world_size):
    """Gradients are 1 / temperature times as large, and so is the rounding of an FP32 log-sum of ten or twenty."""
    results = ranks(world_size, function, vocab_size=250, dtype="float32", temperature=temperature)
    assert_equal(results, gradient=max(1e-6, 1e-6 / temperature))


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY])
def test_bf16_logits(ranks, function, world_size):
    """FP32 arithmetic on the BF16 values; the gradient is rounded to BF16 once, to 8 bits."""
    results = ranks(world_size, function, vocab_size=250, dtype="bfloat16", temperature=0.8)
    assert_equal(results, gradient=2.0**-8)
    assert all(result["gradient_dtype"] == "torch.bfloat16" for result in results)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [250, 60])
@pytest.mark.parametrize("label_smoothing", [0.1, 0.5])
def test_label_smoothing(ranks, label_smoothing, vocab_size, world_size):
    """torch.nn.functional.cross_entropy(label_smoothing=e) over the vocabulary without its padding."""
    options = {"vocab_size": vocab_size, "dtype": "float32", "label_smoothing": label_smoothing}
    assert_equal(ranks(world_size, CROSS_ENTROPY, **options))


@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY, CROSS_ENTROPY])
def test_more_rows_than_one_chunk(ranks, function):
    """Rows are converted in chunks; here two rows a chunk."""
    options = {"label_smoothing": 0.1} if function == CROSS_ENTROPY else {"temperature": 0.9}
    assert_equal(ranks(2, function, vocab_size=250, dtype="float32", chunk_elements=256, **options))


@pytest.mark.slow
@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY, CROSS_ENTROPY])
def test_compiled(ranks, function):
    options = {"label_smoothing": 0.1} if function == CROSS_ENTROPY else {"temperature": 0.9}
    assert_equal(ranks(2, function, vocab_size=250, dtype="float32", compiled=True, **options))


@pytest.mark.parametrize("function", [LOG_PROBS, ENTROPY])
def test_large_logits(ranks, function):
    """Logits of 1e4: no overflow, and an entropy of nearly 0 is no difference of two numbers of 1e4."""
    assert_equal(ranks(2, function, vocab_size=250, dtype="float32", scale=1e4))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [250, 60])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_argmax(ranks, dtype, vocab_size, world_size):
    """Equal to argmax over the whole vocabulary. Ties: labels are the higher, the lower and the lower id."""
    for result in ranks(world_size, "support.losses:argmax_matches", vocab_size=vocab_size, dtype=dtype):
        assert result["equal"]
        assert result["ties"] == [False, True, True]
        assert 0.3 < result["right"] < 0.7
        assert result["dtype"] == "torch.bool" and not result["gradient"]
