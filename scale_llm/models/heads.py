"""Heads other than the vocabulary's."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

HEAD = "score."
"""What its names in checkpoints begin with."""


class ScalarHead(torch.nn.Linear):
    """One number for each token: hidden states [s/tp or s, b, h] -> [s, b, 1]. Whole on every tensor-parallel rank."""

    def __init__(self, config, tp_group, *, bias: bool):
        super().__init__(config.hidden_size, 1, bias=bias, dtype=config.params_dtype)
        self._gathers, self._group = config.sequence_parallel, tp_group
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # its gradient is summed over the ranks

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scores = super().forward(hidden_states)
        if not self._gathers:
            return scores
        return gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self._group)


def is_head(name: str) -> bool:
    """Whether a parameter, by its name in the model, is the head's."""
    return name.startswith("output_layer.")
