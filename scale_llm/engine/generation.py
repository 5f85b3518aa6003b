"""Text from a model as it trains, on its own layout: the likeliest token, again and again.

Every token is a forward pass over all of the text so far, which is enough for the samples of an evaluation.
"""

import torch
import torch.distributed as dist

from scale_llm.engine.engine import Engine
from scale_llm.parallel.context import sequence_chunks

LENGTHS = 64
"""Rows are padded to a multiple of this (and of the layout's), so that few shapes are seen."""


@torch.no_grad()
def greedy(engine: Engine, prompts: list[list[int]], *, max_new_tokens: int, stop: set[int]) -> list[list[int]]:
    """Continuations of the prompts, each up to a token of `stop`, which it includes, or max_new_tokens.

    The same on every rank. Every rank of the mesh calls it; data-parallel ranks do the same work.
    """
    texts, open_rows = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_rows:
            break
        tokens = _next_tokens(engine, [texts[row] for row in open_rows])
        for row, token in zip(open_rows, tokens, strict=True):
            texts[row].append(token)
        open_rows = [row for row, token in zip(open_rows, tokens, strict=True) if token not in stop]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_tokens(engine: Engine, texts: list[list[int]]) -> list[int]:
    """The likeliest token after each text."""
    unit = max(LENGTHS, engine.sequence_multiple)
    width = -(-max(map(len, texts)) // unit) * unit
    rows = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    last = torch.tensor([len(text) - 1 for text in texts])
    batch = {"tokens": rows, "position_ids": torch.arange(width).expand(len(texts), -1).contiguous()}
    found = engine.forward([batch], lambda logits, _: _likeliest(engine, logits, last.to(logits.device)))
    tokens = found[0] if found else torch.zeros(len(texts), dtype=torch.int64, device=engine.device.device)
    if engine.mesh.sizes.pp > 1:
        dist.broadcast(tokens, src=engine.mesh.last_stage_rank, group=engine.mesh.groups.pp)
    return tokens.tolist()


def _likeliest(engine: Engine, logits: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """logits [s/c, b, v/tp], the position of each row's last token [b] -> its likeliest next token [b]."""
    groups = engine.mesh.groups
    rows, mine = last, None
    if groups.cp.size() > 1:
        rows, mine = _on_this_rank(last, logits.size(0), groups.cp)
    values = logits[rows, torch.arange(last.numel(), device=logits.device)].float()  # [b, v/tp]
    start = groups.tp.rank() * values.size(1)
    values[:, max(0, engine.vocab_size - start) :] = -torch.inf
    best, column = values.max(dim=1)
    candidates = torch.stack([best.double(), (column + start).double()])  # ids are exact in FP64
    every = [torch.empty_like(candidates) for _ in range(groups.tp.size())]
    dist.all_gather(every, candidates, group=groups.tp)
    of_ranks = torch.stack(every)  # [tp, 2, b]
    winner = of_ranks[:, 0].argmax(dim=0)
    tokens = of_ranks[winner, 1, torch.arange(last.numel(), device=logits.device)].long()
    if mine is not None:
        tokens = tokens * mine
        dist.all_reduce(tokens, group=groups.cp)
    return tokens


def _on_this_rank(last: torch.Tensor, local: int, cp_group) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [b] of positions among the two chunks of this context-parallel rank (0 where it has them not), and which
    it has [b]."""
    chunk = local // 2
    rows, mine = torch.zeros_like(last), torch.zeros_like(last)
    for half, index in enumerate(sequence_chunks(cp_group)):
        here = (last >= index * chunk) & (last < (index + 1) * chunk)
        rows = torch.where(here, last - index * chunk + half * chunk, rows)
        mine = mine | here.long()
    return rows, mine
