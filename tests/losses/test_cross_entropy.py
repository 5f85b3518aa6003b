"""Cross entropy over a cut vocabulary against torch's own in float64."""

import pytest

LOSS = "support.losses:cross_entropy"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [256, 250, 60])
def test_values_and_gradients(ranks, world_size, vocab_size):
    """256: no padding. 60 of 256: shards 1 to 3 of 4 lie wholly in the padding. Tokens on both edges of every shard."""
    for result in ranks(world_size, LOSS, vocab_size=vocab_size, dtype="float32"):
        assert result["value_error"] < 1e-6
        assert result["gradient_error"] < 1e-6
        assert result["padding_gradient"] == 0.0
        assert result["logits_unchanged"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_logits(ranks, world_size):
    """The loss is FP32 arithmetic on the BF16 values; the gradient is rounded to BF16 once, to 8 bits."""
    for result in ranks(world_size, LOSS, vocab_size=250, dtype="bfloat16"):
        assert result["value_error"] < 1e-6
        assert result["gradient_error"] < 2.0**-8
        assert result["gradient_dtype"] == "torch.bfloat16"
        assert result["logits_unchanged"]


def test_more_rows_than_one_chunk(ranks):
    """Rows are converted in chunks; here two rows a chunk."""
    result = ranks(2, LOSS, vocab_size=250, dtype="float32", chunk_elements=256)[1]
    assert result["value_error"] < 1e-6 and result["gradient_error"] < 1e-6


def test_large_logits_do_not_overflow(ranks):
    result = ranks(2, LOSS, vocab_size=250, dtype="float32", scale=1e4)[0]
    assert result["value_error"] < 1e-6 and result["gradient_error"] < 1e-6


def test_masked_language_model_loss(ranks):
    """Sum and count of the tokens whose mask is 1; [b, s] labels against [s, b, v] logits."""
    result = ranks(1, "support.losses:language_model")[0]
    assert result["sum"] == pytest.approx(result["wanted_sum"], rel=1e-6)
    assert result["count"] == result["wanted_count"]
    assert result["metric"] == (result["sum"], result["count"])
