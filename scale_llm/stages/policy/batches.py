"""Micro-batches of answers for one role, and numbers of their tokens into tables and back.

A micro-batch has, beside what sequence_loader writes, `cells` int64 [b, s]: which cell of a table [n, t], flattened,
the token that follows a place has; -1 where no answer does.
"""

from collections.abc import Callable

import torch

from scale_llm.config.stage import Batching
from scale_llm.data.sequence_loader import Batch, SequenceLoader
from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.roles import Role
from scale_llm.stages.sequences import Listed, shape_of

Values = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]
"""(model output, batch) -> (cells, values), both [m]."""


def rows_of_role(role: Role, answers: Answers, numbers: list[int], budget: int) -> list[Batch]:
    """This rank's micro-batches of some answers: rows of at most so many places, dealt out to the role's replicas."""
    mesh = role.run.mesh
    shape = shape_of(
        role.cfg, mesh, batching=Batching.token_budget, row_tokens=budget, budget=budget, numbered=True
    )  # fmt: skip
    loader = SequenceLoader(
        answers, Listed([[number] for number in numbers]), shape, data_parallel_rank=mesh.dp_rank,
        data_parallel_size=mesh.sizes.dp,
    )  # fmt: skip
    lengths, longest = answers.answer_lengths, int(answers.answer_lengths.max())
    batches = loader.global_batch(0, len(numbers))
    for batch in batches:
        batch["cells"] = _cells(batch, lengths, longest)
    return batches


def _cells(batch: Batch, lengths, longest: int) -> torch.Tensor:
    found = torch.full(batch["tokens"].shape, -1)
    parts = [number * longest + torch.arange(int(lengths[number])) for number in batch["numbers"].tolist()]
    if parts:
        found[batch["loss_mask"] != 0] = torch.cat(parts)
    return found


def with_tables(batches: list[Batch], tables: dict[str, torch.Tensor]) -> list[Batch]:
    """The micro-batches with the numbers of their tokens: name -> FP32 [b, s], 0 where no answer is."""
    return [{**batch, **{name: _taken(table, batch["cells"]) for name, table in tables.items()}} for batch in batches]


def _taken(table: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return torch.where(cells >= 0, table.flatten()[cells.clamp(min=0)], 0)


def fill(table: torch.Tensor, role: Role, parts: list[list[Batch]], fn: Values) -> None:
    """Writes what the role's model finds of the tokens of answers, without gradients and dropout, into a table [n, t]
    on the ranks that speak for it. parts: micro-batches that go through the schedule together."""
    for batches in parts:
        for cells, values in role.engine.forward(batches, fn):
            if role.speaks:
                table.view(-1)[cells.cpu()] = values.float().cpu()
