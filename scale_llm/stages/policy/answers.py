"""The answers of one iteration and tables about their tokens, whole on every rank of the job.

Legend: n answers, t tokens of the longest, g prompts, k answers to each; those to a prompt lie behind each other.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.data.chat.prompts import Prompt
from scale_llm.engine.generation.samples import Completion


class Answer(NamedTuple):
    """A sequence of sequence_loader: the prompt, then the answer, which alone is trained on."""

    tokens: np.ndarray
    trained: np.ndarray
    weight: float


@dataclass(frozen=True)
class Answers:
    """Sequences by their number. prompts: of each answer; completions: likewise; draws: the number of the prompt in the
    order in which the run has drawn them."""

    prompts: list[Prompt]
    completions: list[Completion]
    draws: list[int]

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and answer, int [n]."""
        return np.array([len(p.tokens) for p in self.prompts], dtype=np.int64) + self.answer_lengths

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        """int [n]."""
        return np.array([len(completion.tokens) for completion in self.completions], dtype=np.int64)

    def __getitem__(self, number: int) -> Answer:
        prompt, answer = self.prompts[number].tokens, self.completions[number].tokens
        tokens = np.array(prompt + answer, dtype=np.int64)
        return Answer(tokens, np.arange(len(tokens)) >= len(prompt), 1.0)

    def mask(self) -> torch.Tensor:
        """bool [n, t], where an answer has a token."""
        lengths = torch.from_numpy(self.answer_lengths)
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def sampled_log_probs(self) -> torch.Tensor:
        """[n, t] of the rollout, 0 where there is no token."""
        found = torch.zeros(self.mask().shape)
        for row, completion in zip(found, self.completions, strict=True):
            row[: len(completion.log_probs)] = torch.tensor(completion.log_probs)
        return found

    def chosen(self, numbers: list[int]) -> "Answers":
        """Some of them, renumbered."""
        return Answers(
            [self.prompts[number] for number in numbers],
            [self.completions[number] for number in numbers],
            [self.draws[number] for number in numbers],
        )

    def joined(self, other: "Answers") -> "Answers":
        return Answers(
            self.prompts + other.prompts, self.completions + other.completions, self.draws + other.draws
        )  # fmt: skip


def shared(tables: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Tables that ranks have found parts of, whole on every rank: each number comes from one rank, 0 from the others.

    group: all ranks of the job, over gloo. Every rank names the same tables, of the same shapes.
    """
    for name in sorted(tables):
        dist.all_reduce(tables[name], group=group)
    return tables


def gathered(mine: dict, group: dist.ProcessGroup) -> dict:
    """Entries of all ranks of the job in one dictionary."""
    parts: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, mine, group=group)
    return {key: value for part in parts for key, value in part.items()}
