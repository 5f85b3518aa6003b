"""Collectives through shared memory give what torch.distributed's give, and end when a peer does."""

import pytest

from scale_llm.launch.failures import LOST_PEER


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_those_of_torch(ranks, size):
    """From an empty tensor to some that take several exchanges; reduce-scatter cuts the slot in as many parts."""
    from support.collectives import SLOT

    counts = [0, 1, 7, 1024, SLOT // size, SLOT, SLOT + 1, 3 * SLOT + 5]
    assert ranks(size, "support.collectives:as_torch", counts=counts) == [[]] * size


@pytest.mark.parametrize("size", [2, 4])
def test_mixed_operations_without_pauses(ranks, size):
    """Slots are written anew while a slow rank may still read: every bit is as it must be."""
    turns = 300
    for found in ranks(size, "support.collectives:mixed", turns=turns):
        assert found["wrong"] == [] and found["exchanges"] >= turns


def test_tensors_that_do_not_go_together(ranks):
    first, second = ranks(2, "support.collectives:mismatched")[0]
    assert first == "4 elements of torch.float32 where 6 of torch.float32 are exchanged"
    assert second == "4 elements of torch.float32 where 4 of torch.bfloat16 are exchanged"


def test_nothing_stays_open(ranks):
    assert ranks(2, "support.collectives:handles_left") == [[0, 0, 0]] * 2


def test_without_shared_memory_it_is_gloo(ranks):
    assert ranks(2, "support.collectives:where_there_is_none") == [6.0] * 2


def test_autograd_sees_no_change(ranks):
    assert ranks(2, "support.collectives:saved_for_backward")[0] == pytest.approx(2 * 3 * 2.718281828)


@pytest.mark.parametrize(("axis", "total", "exchanges"), [("tensor", 3, 3), ("data", 6, 4)])
def test_what_megatron_core_starts_is_done_at_once(ranks, axis, total, exchanges):
    """No thread of gloo writes to a tensor while the rank computes."""
    for rank, found in enumerate(ranks(2, f"support.collectives:of_{axis}_parallelism")):
        assert found == {"weights": [1, 1, 2, 2], "share": [[0, 3], [6, 9]][rank], "total": [total] * 3,
                         "exchanges": exchanges, "waited": True, "awaited": None}  # fmt: skip


def test_a_peer_that_ends_is_named_at_once(ranks, tmp_path):
    """In words that the launcher knows for those of a rank that has lost another."""
    words = tmp_path / "words"
    with pytest.raises(FileNotFoundError, match=r"rank_2\.pt"):  # which the rank that ended has not written
        ranks.fresh(3, "support.collectives:without_a_peer", words=str(words), ends=True)
    assert words.read_text().startswith("PeerLost after 0 s: connection closed by peer: rank 2 of this group")
    assert LOST_PEER.search(words.read_text())


def test_a_peer_that_does_not_come_is_waited_for_until_the_timeout(ranks, tmp_path):
    words = tmp_path / "words"
    ranks.fresh(3, "support.collectives:without_a_peer", words=str(words), ends=False)
    first = words.read_text()
    assert first.startswith("TimeoutError after 3 s: rank 2 of this group") and "distributed_timeout_minutes" in first
