"""The next token of every sequence of a batch, and its log-probability, over a vocabulary that is cut over ranks.

Rank r of p tensor-parallel ranks holds columns r*v/p to (r+1)*v/p of the logits; one gather of four numbers for each
sequence finds the winner and the sum of all exponentials. Legend: n sequences, v vocabulary with padding, c candidates.
"""

import torch
import torch.distributed as dist

from scale_llm.engine.generation.noise import gumbel, id_words
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.losses.vocabulary import Shard
from scale_llm.parallel import collectives
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
            first, count = (0, self._vocab_size) if self._filters else (shard.start, shard.valid)
            self._ids = id_words(first, count, logits.device)
        scaled = _scaled(logits[:, : shard.valid], self._params.temperature or 1.0)
        if self._filters:
            return self._of_some(scaled, shard.start, keys)
        if not shard.valid:  # this rank has nothing but padding
            nothing = scaled.new_full((logits.size(0),), -torch.inf)
            return self._winner(nothing, nothing.long() * 0, nothing, nothing)
        if self._params.temperature == 0:
            found = _likeliest(scaled)
        else:
            found = _drawn(scaled, self._ids, keys)
        score, column, value, log_sum = found
        return self._winner(score, column + shard.start, value, log_sum)

    def _of_some(self, scaled, start, keys):
        """Draws among the candidates that top_k and top_p leave; each rank does so with all of them."""
        params = self._params
        whole = self._vocab_size
        count = min(params.top_k or NUCLEUS, whole)
        values, tokens, log_sum = self._candidates(scaled, start, count)
        kept = nucleus(values, log_sum, params)
        if not params.top_k and count < whole and bool(kept[:, -1].any()):  # it may not end there
            values, tokens, log_sum = self._candidates(scaled, start, whole)
            kept = nucleus(values, log_sum, params)
        score = (values + gumbel(self._ids[tokens], keys)).masked_fill(~kept, -torch.inf)
        chosen = score.argmax(dim=1, keepdim=True)
        return tokens.gather(1, chosen)[:, 0], values.gather(1, chosen)[:, 0] - log_sum

    def _candidates(self, scaled, start, count):
        """The `count` largest values of each row, in order, and their tokens, [n, count] each; the logarithm of the
        sum of exponentials of all [n]."""
        here = min(count, scaled.size(1))
        values, tokens = scaled.topk(here, dim=1)
        tokens, log_sum = tokens + start, torch.logsumexp(scaled, dim=1)
        ranks = self._group.size()
        if ranks == 1:
            return values, tokens, log_sum
        room = count - here
        values = torch.nn.functional.pad(values, (0, room), value=-torch.inf)
        tokens = torch.nn.functional.pad(tokens, (0, room))
        mine = torch.cat([values.double(), tokens.double(), log_sum.double()[:, None]], dim=1)
        every = self._of_all_ranks(mine)
        values = torch.cat([part[:, :count] for part in every], dim=1)
        tokens = torch.cat([part[:, count:-1] for part in every], dim=1)
        values, places = values.topk(count, dim=1)
        log_sum = torch.logsumexp(every[:, :, -1], dim=0)
        return values.float(), tokens.gather(1, places).long(), log_sum.float()

    def _of_all_ranks(self, mine: torch.Tensor) -> torch.Tensor:
        """[a, b] of every rank -> [p, a, b]."""
        every = mine.new_empty(self._group.size() * mine.size(0), mine.size(1))
        collectives.all_gather_into_tensor(every, mine.contiguous(), group=self._group)
        return every.view(self._group.size(), *mine.shape)

    def _winner(self, score, token, value, log_sum):
        """Over the ranks: the token of the largest score, and its value less the logarithm of all exponentials."""
        ranks = self._group.size()
        if ranks == 1:
            return token, value - log_sum
        mine = torch.stack([score.double(), token.double(), value.double(), log_sum.double()])  # ids are exact in FP64
        scores, tokens, values, log_sums = self._of_all_ranks(mine).transpose(0, 1)  # [p, n] each
        winner = scores.argmax(dim=0, keepdim=True)
        log_prob = values.gather(0, winner)[0] - torch.logsumexp(log_sums, dim=0)
        return tokens.gather(0, winner)[0].long(), log_prob.float()


def nucleus(values: torch.Tensor, log_sum: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which candidates top_p keeps: those that likelier ones do not yet make up the sum without.

    values: [n, c] in falling order; log_sum: [n], of the exponentials of all tokens -> bool [n, c]. With top_k the
    candidates are all there is, and their probabilities sum to 1.
    """
    if params.top_k:
        log_sum = torch.logsumexp(values, dim=1)
    probability = torch.exp(values - log_sum[:, None])
    return probability.cumsum(dim=1) - probability < params.top_p


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
