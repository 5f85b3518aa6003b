"""Rows of tokens to batches: labels, weights of the loss, positions, and which places may attend to which.

Shapes: b rows, s the sequence length. The same values as megatron-core's GPTDataset makes sample by sample; the tests
hold them equal.
"""

from dataclasses import dataclass, field

import torch

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMaker:
    """What of a batch follows from its tokens."""

    eod: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    _same: Batch = field(default_factory=dict)
    """What is equal for every batch of a shape, made once: no batch may be written to."""

    def __call__(self, rows: torch.Tensor) -> Batch:
        """rows: int64 [b, s + 1]. Gives tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s], and with
        `reset_attention_mask` attention_mask bool [b, 1, s, s], True where attention is forbidden."""
        tokens, labels = (torch.empty_like(rows[:, 1:], memory_format=torch.contiguous_format) for _ in range(2))
        tokens.copy_(rows[:, :-1])
        labels.copy_(rows[:, 1:])
        batch = {"tokens": tokens, "labels": labels}
        if self.reset_attention_mask:
            document = self._starts(tokens).cumsum(1)
            other = document[:, :, None] != document[:, None, :]
            later = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool, device=rows.device).triu(1)
            batch["attention_mask"] = (other | later)[:, None]
        batch["loss_mask"] = (tokens != self.eod).float() if self.eod_mask_loss else self._constant("ones", tokens)
        places = self._constant("places", tokens)
        if self.reset_position_ids:
            places = places - (places * self._starts(tokens)).cummax(1).values
        batch["position_ids"] = places
        return batch

    def _starts(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [b, s]: 1 where a document begins after another in the row, else 0."""
        starts = torch.zeros_like(tokens)
        starts[:, 1:] = tokens[:, :-1] == self.eod
        return starts

    def _constant(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        key = f"{name} {tuple(tokens.shape)} {tokens.device}"
        if key not in self._same:
            ones = torch.ones(tokens.shape, dtype=torch.float32, device=tokens.device)
            places = torch.arange(tokens.size(1), device=tokens.device).repeat(tokens.size(0), 1)
            self._same[key] = ones if name == "ones" else places
        return self._same[key]
