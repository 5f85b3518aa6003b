"""Vocabulary-parallel cross entropy against torch's own on the whole, unpadded vocabulary in FP64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from scale_llm.losses.cross_entropy import _CHUNK_ELEMENTS, vocab_parallel_cross_entropy

VOCABULARY, PADDED = 250, 256


def inputs(dtype, vocabulary=VOCABULARY, padded=PADDED, shape=(7, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(*shape, padded, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    return logits, labels, torch.rand(*shape, generator=generator, dtype=torch.float64)


def exact(logits, labels, weights, vocabulary):
    """Losses and gradient in FP64, over the columns below the vocabulary."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits[..., :vocabulary].flatten(0, -2), labels.flatten(), reduction="none")
    losses.view(labels.shape).backward(weights)
    return losses.detach().view(labels.shape), logits.grad


def error(ours, wanted):
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "losses_within", "gradient_within"),
    [(torch.float64, 1e-7, 1e-12), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize("uniform", [True, False])
def test_losses_and_gradient(dtype, losses_within, gradient_within, uniform):
    """One rank. BF16 logits lose nothing more: the losses are FP32 of the rounded logits."""
    logits, labels, weights = inputs(dtype)
    if uniform:
        weights.fill_(1.0)
    logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, labels, None, VOCABULARY)
    losses.backward(weights.float())
    wanted, gradient = exact(logits.detach(), labels, weights.float().double(), VOCABULARY)
    assert losses.dtype == torch.float32 and error(losses, wanted) < losses_within
    assert logits.grad.dtype == dtype and error(logits.grad, gradient) < gradient_within
    assert (logits.grad[..., VOCABULARY:] == 0).all()


def test_several_chunks_of_rows():
    rows = 2 * _CHUNK_ELEMENTS // 4096 + 3
    logits, labels, weights = inputs(torch.float32, 4096, 4096, shape=(rows,))
    logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, labels, None, 4096)
    losses.backward(weights.float())
    wanted, gradient = exact(logits.detach(), labels, weights.float().double(), 4096)
    assert error(losses, wanted) < 1e-6 and error(logits.grad, gradient) < 1e-6


def test_targets_without_probability():
    """A target 1000 below the largest logit: its probability is 0 in FP32, its loss is 1000."""
    logits = torch.zeros(2, PADDED)
    logits[:, 3] = 1000.0
    labels = torch.tensor([5, 3])
    logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, labels, None, VOCABULARY)
    losses.sum().backward()
    assert losses.tolist() == [1000.0, 0.0]
    assert logits.grad[0, 5] == -1 and logits.grad[0, 3] == 1 and not logits.grad[1].any()


def test_nothing_is_kept_without_a_gradient():
    logits, labels, _ = inputs(torch.float32)
    losses = vocab_parallel_cross_entropy(logits, labels, None, VOCABULARY)
    assert losses.grad_fn is None
    assert error(losses, exact(logits, labels, torch.ones(7, 3).double(), VOCABULARY)[0]) < 1e-6


def _shard(rank, size, store, results):
    """One rank of a group: its columns of the vocabulary."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = []
    for vocabulary, padded in ((VOCABULARY, PADDED), (100, PADDED)):
        logits, labels, weights = inputs(torch.float32, vocabulary, padded)
        mine = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
        losses = vocab_parallel_cross_entropy(mine, labels, dist.group.WORLD, vocabulary)
        losses.backward(weights.float())
        found.append((losses.detach(), mine.grad))
    torch.save(found, f"{results}/{rank}")
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """Losses equal on both ranks and right; gradients are the shards. With 100 tokens rank 1 holds padding only."""
    torch.multiprocessing.spawn(_shard, (2, tmp_path / "store", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for case, vocabulary in enumerate((VOCABULARY, 100)):
        logits, labels, weights = inputs(torch.float32, vocabulary, PADDED)
        wanted, gradient = exact(logits, labels, weights.float().double(), vocabulary)
        assert torch.equal(ranks[0][case][0], ranks[1][case][0])
        assert error(ranks[0][case][0], wanted) < 1e-6
        assert error(torch.cat([r[case][1] for r in ranks], dim=-1), gradient) < 1e-6
