"""What ranks do in the tests of the losses. Legend: n tokens, v vocabulary with padding, p ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from scale_llm.losses import log_probabilities, preference, sequences, vocabulary
from scale_llm.losses.advantages import reinforce_plus_plus, whiten
from scale_llm.losses.cross_entropy import vocab_parallel_cross_entropy
from scale_llm.losses.language_model import language_model_loss
from scale_llm.parallel.context import shard_sequence
from support.device import begin

PADDED = 256


def cross_entropy(vocab_size: int, dtype: str, label_smoothing: float = 0.0, **options) -> dict:
    """vocab_parallel_cross_entropy against torch's."""

    def ours(logits, labels, group):
        return vocab_parallel_cross_entropy(logits, labels, group, vocab_size, label_smoothing=label_smoothing)

    def plain(logits, labels):
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        return losses.view(labels.shape)

    return _compared(ours, plain, vocab_size, dtype, **options)


def log_probs(vocab_size: int, dtype: str, temperature: float = 1.0, **options) -> dict:
    """vocab_parallel_log_probs against log_softmax and gather."""

    def ours(logits, tokens, group):
        return log_probabilities.vocab_parallel_log_probs(logits, tokens, group, vocab_size, temperature)

    def plain(logits, tokens):
        return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

    return _compared(ours, plain, vocab_size, dtype, **options)


def entropy(vocab_size: int, dtype: str, temperature: float = 1.0, **options) -> dict:
    """vocab_parallel_entropy against -sum p log p."""

    def ours(logits, tokens, group):
        return log_probabilities.vocab_parallel_entropy(logits, group, vocab_size, temperature)

    def plain(logits, tokens):
        log_p = (logits / temperature).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return _compared(ours, plain, vocab_size, dtype, **options)


def _compared(
    ours, plain, vocab_size: int, dtype: str, chunk_elements: int | None = None, scale: float = 3.0, compiled=False
) -> dict:
    """Largest errors of this rank's shard [5, 9, v/p] against float64 over the real vocabulary, weights not all one."""
    device = begin(compile_ops=compiled).device
    if chunk_elements is not None:
        vocabulary.CHUNK_ELEMENTS = chunk_elements
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(7)
    whole = (torch.randn(5, 9, PADDED, generator=generator) * scale).to(getattr(torch, dtype))
    labels = torch.randint(0, vocab_size, (5, 9), generator=generator)
    edges = [i for i in (0, 63, 64, 127, 128, 191, 192, vocab_size - 1) if i < vocab_size]
    labels[0, : len(edges)] = torch.tensor(edges)
    weights = torch.rand(5, 9, generator=generator)
    whole, labels, weights = (x.to(device) for x in (whole, labels, weights))

    exact = whole[..., :vocab_size].double().requires_grad_()
    wanted = plain(exact, labels)
    (wanted * weights).sum().backward()
    gradient = F.pad(exact.grad, (0, PADDED - vocab_size)).chunk(size, dim=-1)[rank]

    shard = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    before = shard.detach().clone()
    losses = ours(shard, labels, group)
    (losses * weights).sum().backward()
    padding = max(0, min(PADDED // size, (rank + 1) * PADDED // size - vocab_size))
    return {
        "value_error": ((losses - wanted).abs() / wanted.abs().clamp(min=1)).max().item(),
        "gradient_error": (shard.grad - gradient).abs().max().item(),
        "padding_gradient": shard.grad[..., PADDED // size - padding :].abs().sum().item(),
        "logits_unchanged": torch.equal(shard.detach(), before),
        "gradient_dtype": str(shard.grad.dtype),
        "dtype": str(losses.dtype),
    }


def four_logits(logits: list[float], token: int) -> tuple[float, float]:
    """Log-probability of `token` and entropy of a vocabulary of four, padded to eight with the largest logit of all."""
    begin()
    group = dist.group.WORLD
    whole = torch.tensor([[*logits, 100.0, 100.0, 100.0, 100.0]])
    shard = whole.chunk(group.size(), dim=-1)[group.rank()]
    value = log_probabilities.vocab_parallel_log_probs(shard, torch.tensor([token]), group, 4)
    return value.item(), log_probabilities.vocab_parallel_entropy(shard, group, 4).item()


def argmax_matches(vocab_size: int, dtype: str) -> dict:
    """How often each rank agrees with argmax, and on ties within a shard and between shards. Padding is highest."""
    begin()
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(6, 50, PADDED, generator=generator).to(getattr(torch, dtype))
    for row, tied in enumerate([(3, 5), (3, vocab_size - 1), (vocab_size - 2, vocab_size - 1)]):
        whole[row, 0, list(tied)] = 9.0
    whole[..., vocab_size:] = 99.0
    best = whole[..., :vocab_size].argmax(-1)
    labels = torch.where(torch.rand(best.shape, generator=generator) < 0.5, best, (best + 1) % vocab_size)
    labels[0, 0], labels[1, 0], labels[2, 0] = 5, 3, vocab_size - 2
    shard = whole.chunk(group.size(), dim=-1)[group.rank()].requires_grad_()
    found = log_probabilities.vocab_parallel_argmax_matches(shard, labels, group, vocab_size)
    return {
        "equal": torch.equal(found, labels == best),
        "ties": found[:3, 0].tolist(),
        "right": found.float().mean().item(),
        "dtype": str(found.dtype),
        "gradient": found.requires_grad,
    }


def language_model() -> dict:
    """Summed loss of 2 samples of 6 tokens under a mask, and the same by a loop over tokens."""
    begin()
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 2, 32, generator=generator)
    batch = {
        "labels": torch.randint(0, 30, (2, 6), generator=generator),
        "loss_mask": torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.float32),
    }
    wanted = 0.0
    for b in range(2):
        for s in range(6):
            if batch["loss_mask"][b, s]:
                wanted -= logits[s, b, :30].double().log_softmax(-1)[batch["labels"][b, s]].item()
    loss, count, metrics = language_model_loss(logits, batch, None, 30)
    metric = tuple(x.item() for x in metrics["lm loss"])
    return {"sum": loss.item(), "count": count.item(), "metric": metric, "wanted_sum": wanted, "wanted_count": 6}


def packed_answers() -> tuple[torch.Tensor, ...]:
    """Log-probabilities [16, 1] of 4 packed answers of 4, 1, 5 and 3 tokens, 3 tokens of padding, a mask, segments."""
    generator = torch.Generator().manual_seed(11)
    values = -torch.rand(16, 1, generator=generator, dtype=torch.float64)
    segments = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, -1, -1, -1])[:, None]
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0])[:, None]
    return values, mask, segments


def context_parallel_preference() -> dict:
    """IPO of two pairs from tokens cut over the ranks as Megatron cuts them, against the same uncut."""
    begin()
    group = dist.group.WORLD
    values, mask, segments = packed_answers()

    def losses(tokens, mask, segments, cp_group):
        sums, counts = sequences.segment_sums(tokens, mask, segments, 4, cp_group)
        reference = torch.tensor([-1.0, -0.5], dtype=torch.float64)
        pairs = preference.Pairs(sums[0::2], sums[1::2], reference, 2 * reference, counts[0::2], counts[1::2])
        return preference.ipo(pairs, beta=0.5), counts

    whole = values.clone().requires_grad_()
    wanted, wanted_counts = losses(whole, mask, segments, None)
    wanted.sum().backward()
    part = shard_sequence(values, 0, group).clone().requires_grad_()
    found, counts = losses(part, shard_sequence(mask, 0, group), shard_sequence(segments, 0, group), group)
    found.sum().backward()
    return {
        "value_error": (found - wanted).abs().max().item(),
        "gradient_error": (part.grad - shard_sequence(whole.grad, 0, group)).abs().max().item(),
        "counts": counts.tolist(),
        "wanted_counts": wanted_counts.tolist(),
        "tokens_here": int(shard_sequence(mask, 0, group).sum()),
    }


def token_mean() -> float:
    """The mean of tokens {1, 2} on rank 0 and {3 .. 7} on rank 1, as sum and count."""
    begin()
    tokens = torch.tensor([[1.0, 2.0, torch.inf, 0.0, torch.nan], [3.0, 4.0, 5.0, 6.0, 7.0]])[dist.get_rank()]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])[dist.get_rank()]
    total = torch.stack(sequences.masked_sum(tokens, mask))
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def whitening(empty_rank: int | None = None) -> dict:
    """Whitening of each rank's rows against that of all rows at once; one rank may have nothing under its mask."""
    begin()
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(size * 3, 7, generator=generator, dtype=torch.float64) * 4 + 100
    mask = torch.rand(size * 3, 7, generator=generator) < 0.6
    if empty_rank is not None:
        mask[3 * empty_rank : 3 * empty_rank + 3] = False
    values[~mask] = torch.nan
    mine = slice(3 * rank, 3 * rank + 3)
    found = whiten(values[mine], mask[mine], group=dist.group.WORLD)
    kept = values[mask]
    wanted = torch.zeros_like(values)
    wanted[mask] = (kept - kept.mean()) / kept.std(correction=0)
    advantages = reinforce_plus_plus(values[mine], mask[mine], group=dist.group.WORLD)
    return {
        "error": (found - wanted[mine]).abs().max().item(),
        "reinforce_error": (advantages - reinforce_plus_plus(values, mask)[mine]).abs().max().item(),
        "tokens_here": int(mask[mine].sum()),
    }
