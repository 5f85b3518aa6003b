"""The next token of every sequence of a batch, and its log-probability, over a vocabulary that is cut over ranks.

Rank r of p tensor-parallel ranks holds columns r*v/p to (r+1)*v/p of the logits; one gather of four numbers for each
sequence finds the winner and the sum of all exponentials. Legend: n sequences, v vocabulary with padding, c candidates.
"""

import torch
import torch.distributed as dist

from scale_llm.engine.generation.noise import gumbel, id_words
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.losses.vocabulary import Shard
from scale_llm.parallel.fused import fused

NUCLEUS = 1024
"""Candidates of each rank among which top_p looks first; where they do not reach its sum, all are sorted."""


class Sampler:
    """Draws under one set of parameters; every tensor-parallel rank gets the same tokens."""

    def __init__(self, params: SamplingParams, tp_group: dist.ProcessGroup, vocab_size: int):
        """vocab_size: tokens before padding."""
        self._params, self._group, self._vocab_size = params, tp_group, vocab_size
        self._filters = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1.0)
        self._ids: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [n, v/p] of any float type, keys int32 [n, 2] of `token_keys` -> tokens int64 [n], log-probabilities
        FP32 [n]. A collective of the tensor-parallel group."""
        shard = Shard.of(logits, self._group, self._vocab_size)
        if self._ids is None:
            self._ids = id_words(shard.start, shard.valid, logits.device)
        scaled = _scaled(logits[:, : shard.valid], self._params.temperature or 1.0)
        if not shard.valid:  # this rank has nothing but padding
            nothing = scaled.new_full((logits.size(0),), -torch.inf)
            return self._winner(nothing, nothing.long() * 0, nothing, nothing)
        if self._params.temperature == 0:
            found = _likeliest(scaled)
        elif self._filters:
            raise NotImplementedError
        else:
            found = _drawn(scaled, self._ids, keys)
        score, column, value, log_sum = found
        return self._winner(score, column + shard.start, value, log_sum)

    def _winner(self, score, token, value, log_sum):
        """Over the ranks: the token of the largest score, and its value less the logarithm of all exponentials."""
        ranks = self._group.size()
        if ranks == 1:
            return token, value - log_sum
        mine = torch.stack([score.double(), token.double(), value.double(), log_sum.double()])  # ids are exact in FP64
        every = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(every, mine, group=self._group)
        scores, tokens, values, log_sums = torch.stack(every, dim=1)  # [p, n] each
        winner = scores.argmax(dim=0, keepdim=True)
        log_prob = values.gather(0, winner)[0] - torch.logsumexp(log_sums, dim=0)
        return tokens.gather(0, winner)[0].long(), log_prob.float()


@fused(dynamic=True)
def _scaled(logits, temperature):
    """[n, v] in FP32, divided by the temperature."""
    return logits.float() / temperature


@fused(dynamic=True)
def _likeliest(scaled):
    """[n, v] -> score, column, value and logarithm of the sum of exponentials [n] each."""
    value, column = scaled.max(dim=1)
    return value, column, value, torch.logsumexp(scaled, dim=1)


@fused(dynamic=True)
def _drawn(scaled, ids, keys):
    """The same for the largest sum of value and noise."""
    score, column = (scaled + gumbel(ids, keys)).max(dim=1)
    value = scaled.gather(1, column[:, None])[:, 0]
    return score, column, value, torch.logsumexp(scaled, dim=1)
