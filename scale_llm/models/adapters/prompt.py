"""Learnt vectors in the places of virtual tokens (prompt tuning; Lester et al. 2021, arXiv 2104.08691).

Token ids from the vocabulary's size on stand for them: data puts vocab_size + i in the places of vector i.

Shapes: s sequence, b batch, h hidden, p tensor-parallel ranks, n vectors.
"""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class VirtualTokens(torch.nn.Module):
    """The vectors, [n, h], whole on every tensor-parallel rank."""

    def __init__(self, count: int, embedding: LanguageModelEmbedding, vocab_size: int):
        super().__init__()
        like, config = embedding.word_embeddings.weight, embedding.config
        self._group, self._first = embedding.tp_group, vocab_size
        self._sequence_parallel = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.zeros(count, config.hidden_size, dtype=like.dtype, device=like.device))
        self.weight.sequence_parallel = config.sequence_parallel

    @torch.no_grad()
    def begin(self, table, tokens: list[int]) -> None:
        """The vectors begin as the embeddings of tokens, over and over where there are fewer. table: megatron-core's
        VocabParallelEmbedding. A collective of the tensor-parallel group."""
        wanted = torch.tensor(tokens, device=self.weight.device)
        wanted = wanted.repeat(-(-self.weight.size(0) // len(tokens)))[: self.weight.size(0)]
        first, last = table.vocab_start_index, table.vocab_end_index
        here = (wanted >= first) & (wanted < last)
        rows = table.weight[(wanted - first).clamp(0, last - first - 1)] * here.unsqueeze(1)
        torch.distributed.all_reduce(rows, group=self._group)
        self.weight.copy_(rows)

    def known(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens with any of the vocabulary in the places of virtual ones."""
        return tokens.masked_fill(tokens >= self._first, 0)

    def put(self, embedded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """embedded [s or s/p, b, h] with the vectors in the places of virtual tokens [b, s]."""
        tokens = tokens.transpose(0, 1)
        if self._sequence_parallel:
            tokens = tokens.chunk(self._group.size())[self._group.rank()]
        number = (tokens - self._first).clamp(min=0)
        return torch.where((tokens >= self._first).unsqueeze(-1), self.weight[number], embedded)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets, tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
