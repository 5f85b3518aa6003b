"""What ranks do in the tests of the losses. Legend: n tokens, v vocabulary with padding, p ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from scale_llm.losses import cross_entropy as module
from scale_llm.losses.language_model import language_model_loss
from scale_llm.parallel.device import start

PADDED = 256


def cross_entropy(vocab_size: int, dtype: str, chunk_elements: int | None = None, scale: float = 3.0) -> dict:
    """Largest errors of this rank's shard [5, 9, v/p] against float64 over the real vocabulary, weights not all one."""
    start("cpu", threads=1)
    if chunk_elements is not None:
        module._CHUNK_ELEMENTS = chunk_elements
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(7)
    whole = (torch.randn(5, 9, PADDED, generator=generator) * scale).to(getattr(torch, dtype))
    labels = torch.randint(0, vocab_size, (5, 9), generator=generator)
    edges = [i for i in (0, 63, 64, 127, 128, 191, 192, vocab_size - 1) if i < vocab_size]
    labels[0, : len(edges)] = torch.tensor(edges)
    weights = torch.rand(5, 9, generator=generator)

    exact = whole[..., :vocab_size].double().requires_grad_()
    wanted = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(5, 9)
    (wanted * weights).sum().backward()
    gradient = F.pad(exact.grad, (0, PADDED - vocab_size)).chunk(size, dim=-1)[rank]

    shard = whole.chunk(size, dim=-1)[rank].clone().requires_grad_()
    before = shard.detach().clone()
    losses = module.vocab_parallel_cross_entropy(shard, labels, group, vocab_size)
    (losses * weights).sum().backward()
    padding = max(0, min(PADDED // size, (rank + 1) * PADDED // size - vocab_size))
    return {
        "value_error": ((losses - wanted).abs() / wanted.abs().clamp(min=1)).max().item(),
        "gradient_error": (shard.grad - gradient).abs().max().item(),
        "padding_gradient": shard.grad[..., PADDED // size - padding :].abs().sum().item(),
        "logits_unchanged": torch.equal(shard.detach(), before),
        "gradient_dtype": str(shard.grad.dtype),
    }


def language_model() -> dict:
    """Summed loss of 2 samples of 6 tokens under a mask, and the same by a loop over tokens."""
    start("cpu", threads=1)
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
