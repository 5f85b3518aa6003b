"""A micro-batch of three answers, packed behind their prompts, and its losses by the formulas, one token at a time.

Legend: s places of the row, v vocabulary with padding, t tokens of answers.
"""

import math

import torch
import torch.distributed as dist

from scale_llm.losses.policy_batch import answer_token_log_probs, policy_batch_loss
from scale_llm.parallel.context import shard_sequence
from scale_llm.parallel.device import start

PLACES, VOCABULARY, PADDED = 24, 29, 32
TEMPERATURE = 0.7
ANSWERS = ((2, 5), (9, 3), (13, 6))
"""(place of the first token that a model is trained to say, tokens), each in a sequence of its own."""
SEQUENCES = ((0, 7), (7, 12), (12, 19))

OPTIONS = {
    "temperature": TEMPERATURE, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "of_sequences": False,
    "entropy_coeff": 0.0, "kl": None, "kl_coef": 0.0, "importance_cap": None,
}  # fmt: skip
CASES = {
    "clip": {},
    "dual_clip": {"dual_clip": 1.1},
    "gspo": {"of_sequences": True, "clip_low": 0.05, "clip_high": 0.08},
    "entropy": {"entropy_coeff": 0.1},
    "k2": {"kl": "k2", "kl_coef": 0.3},
    "k3": {"kl": "k3", "kl_coef": 0.3},
    "importance": {"importance_cap": 1.2},
    "all": {"dual_clip": 1.1, "entropy_coeff": 0.1, "kl": "k3", "kl_coef": 0.3, "importance_cap": 1.2},
    "all_of_gspo": {
        "of_sequences": True,
        "clip_low": 0.05,
        "clip_high": 0.08,
        "dual_clip": 1.1,
        "entropy_coeff": 0.1,
        "kl": "k3",
        "kl_coef": 0.3,
        "importance_cap": 1.2,
    },
}


def example() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [s, 1, v], the padding highest, and a batch, all [1, s] but `numbers`.

    Weights and shares under the mask are nan and infinite: they must not count.
    """
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    logits = random(PLACES, 1, PADDED)
    logits[..., VOCABULARY:] = 50.0
    labels = torch.randint(0, VOCABULARY, (1, PLACES), generator=generator)
    mask, segments = torch.zeros(1, PLACES), torch.full((1, PLACES), -1)
    for number, ((first, count), (begin, end)) in enumerate(zip(ANSWERS, SEQUENCES, strict=True)):
        mask[:, first : first + count] = 1
        segments[:, begin:end] = number
    exact = (logits[..., :VOCABULARY] / TEMPERATURE).log_softmax(-1)
    log_probs = exact[:, 0].gather(-1, labels.t()).t()
    batch = {
        "labels": labels, "loss_mask": mask, "segments": segments, "numbers": torch.tensor([5, 0, 3]),
        "old_log_probs": log_probs + 0.4 * random(1, PLACES),
        "reference_log_probs": log_probs + 0.3 * random(1, PLACES),
        "advantages": random(1, PLACES),
        "weights": torch.rand(1, PLACES, generator=generator) + 0.1,
        "shares": torch.rand(1, PLACES, generator=generator) + 0.1,
    }  # fmt: skip
    batch["sampled_log_probs"] = batch["old_log_probs"] + 0.3 * random(1, PLACES)
    for name, junk in (("weights", torch.nan), ("shares", torch.inf)):
        batch[name] = torch.where(mask != 0, batch[name], junk)
    batch["cells"] = torch.full((1, PLACES), -1)
    batch["cells"][mask != 0] = torch.arange(100, 100 + int(mask.sum()))
    return logits, batch


def by_hand(logits: torch.Tensor, batch: dict[str, torch.Tensor], **options):
    """(loss, divisor, metrics as (sum, count)): the formulas of policy.py's docstrings over the tokens of answers."""
    chosen = {**OPTIONS, **options}
    low, high, dual = chosen["clip_low"], chosen["clip_high"], chosen["dual_clip"]
    flat = {name: value[0] for name, value in batch.items() if name != "numbers"}
    log_p = (logits[:, 0, :VOCABULARY].double() / chosen["temperature"]).log_softmax(-1)
    loss, divisor, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
    sums = dict.fromkeys(("pg_loss", "kl_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "ratio", "entropy"), 0.0)
    for first, count in ANSWERS:
        places = range(first, first + count)
        d = {i: log_p[i, flat["labels"][i]] - flat["old_log_probs"][i].double() for i in places}
        mean = sum(d.values()) / count
        for i in places:
            a, weight = flat["advantages"][i].item(), flat["weights"][i].item()
            # GSPO-token, eq. 14: the sequence's ratio, the token's gradient
            log_ratio = mean.detach() + d[i] - d[i].detach() if chosen["of_sequences"] else d[i]
            ratio = log_ratio.exp()
            term = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
            if dual is not None and a < 0:
                term = torch.minimum(term, torch.tensor(-a * dual, dtype=torch.float64))
            if chosen["importance_cap"] is not None:
                apart = (flat["old_log_probs"][i] - flat["sampled_log_probs"][i]).item()
                term = term * min(math.exp(apart), chosen["importance_cap"])
            entropy = -(log_p[i].exp() * log_p[i]).sum()
            sums["pg_loss"] += weight * term.item()
            total = term - chosen["entropy_coeff"] * entropy
            if chosen["kl"]:
                k = log_p[i, flat["labels"][i]] - flat["reference_log_probs"][i].double()
                penalty = k**2 / 2 if chosen["kl"] == "k2" else (-k).exp() - 1 + k
                total = total + chosen["kl_coef"] * penalty
                sums["kl_loss"] += weight * penalty.item()
            loss = loss + weight * total
            divisor += flat["shares"][i].item()
            tokens += 1
            r = ratio.item()
            sums["pg_clipfrac"] += float((a > 0 and r > 1 + high) or (a < 0 and r < 1 - low))
            sums["pg_clipfrac_lower"] += float(dual is not None and a < 0 and r > dual)
            sums["ppo_kl"] += -d[i].item()
            sums["ratio"] += r
            sums["entropy"] += entropy.item()
    weighted = ("pg_loss", "kl_loss")
    metrics = {f"actor/{name}": (value, divisor if name in weighted else tokens) for name, value in sums.items()}
    if chosen["kl"] is None:
        del metrics["actor/kl_loss"]
    return loss, divisor, metrics


def on_ranks(case: str, axis: str) -> dict:
    """This rank's loss of its part of the vocabulary (axis tp) or of the sequence (cp), and of that its errors: of the
    values added up over context-parallel ranks, and of its part of the gradient, against the formulas on the whole."""
    start("cpu", threads=1)
    group = dist.group.WORLD
    logits, batch = example()
    exact = logits.double().requires_grad_()
    wanted, divisor, metrics = by_hand(exact, batch, **CASES[case])
    wanted.backward()
    if axis == "tp":
        cut = lambda x: x.chunk(group.size(), dim=-1)[group.rank()]  # noqa: E731
        part, groups = batch, (group, None)
    else:
        cut = lambda x: shard_sequence(x, 0, group)  # noqa: E731
        part = {name: shard_sequence(x, 1, group) if x.dim() == 2 else x for name, x in batch.items()}
        groups = (None, group)
    mine = cut(logits).clone().requires_grad_()
    loss, count, found = policy_batch_loss(mine, part, *groups, VOCABULARY, **{**OPTIONS, **CASES[case]})
    loss.backward()
    numbers = [loss.detach().double(), count.double(), *(x.double() for pair in found.values() for x in pair)]
    sums = torch.stack(numbers)
    if axis == "cp":
        dist.all_reduce(sums)
    told = torch.tensor([wanted.item(), divisor, *(x for name in found for x in metrics[name])], dtype=torch.float64)
    cells, values = answer_token_log_probs(mine, part, groups[0], VOCABULARY, TEMPERATURE)
    log_probs = (exact.detach()[:, 0, :VOCABULARY] / TEMPERATURE).log_softmax(-1).gather(-1, batch["labels"].t())[:, 0]
    place = {cell: i for i, cell in enumerate(batch["cells"][0].tolist()) if cell >= 0}
    of_cells = torch.stack([log_probs[place[cell]] for cell in cells.tolist()]) if len(cells) else values.double()
    return {
        "names": sorted(found) == sorted(metrics),
        "value_error": ((sums - told).abs() / told.abs().clamp(min=1)).max().item(),
        "gradient_error": (mine.grad - cut(exact.grad)).abs().max().item(),
        "largest_gradient": exact.grad.abs().max().item(),
        "look_error": (values - of_cells).abs().max().item() if len(cells) else 0.0,
        "cells": cells.tolist(),
        "tokens_here": int((part["loss_mask"] != 0).sum()),
    }
