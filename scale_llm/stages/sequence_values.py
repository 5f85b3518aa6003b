"""Numbers of whole sequences under a model as it is now, without gradients and dropout: log-probabilities, scores.

Every rank of a data-parallel replica asks for the same sequences and gets the same values, by their numbers.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from scale_llm.config.model import Head
from scale_llm.data.sequence_loader import Batch, TokenSequences
from scale_llm.engine.engine import Engine
from scale_llm.losses.direct_preference import answer_log_probs
from scale_llm.losses.reward import sequence_scores
from scale_llm.stages.context import RunContext
from scale_llm.stages.sequences import rows_of


def log_probs_of(
    run: RunContext, engine: Engine, sequences: TokenSequences, samples: list[list[int]], *, row_tokens: int = 0
) -> dict[int, float]:
    """Of the answer of every sequence: summed over its tokens, FP32, in nats.

    samples: sequences that go into one row together. row_tokens: samples share rows of so many; 0: no more than the
    longest takes.
    """
    batches = rows_of(run.cfg, run.mesh, sequences, samples, row_tokens=row_tokens)
    groups = run.mesh.groups
    fn = partial(answer_log_probs, tp_group=groups.tp, cp_group=groups.cp, vocab_size=run.vocab_size)
    return _values(run, engine, batches, lambda logits, batch: fn(logits, batch)[0])


def scores_of(run: RunContext, engine: Engine, sequences: TokenSequences, numbers: list[int]) -> dict[int, float]:
    """By a model with a head of one number: that of the last token that counts, or with model.head=value the mean of
    those of all that count. FP32."""
    batches = rows_of(
        run.cfg, run.mesh, sequences, [[number] for number in numbers], row_tokens=run.cfg.model.seq_length, whole=True,
        every_token=run.cfg.model.head is Head.value,
    )  # fmt: skip
    cp_group = run.mesh.groups.cp
    return _values(run, engine, batches, lambda output, batch: sequence_scores(output, batch, cp_group)[0])


def _values(
    run: RunContext, engine: Engine, batches: list[Batch], fn: Callable[[torch.Tensor, Batch], torch.Tensor]
) -> dict[int, float]:
    """fn gives a value for each of a batch's `numbers`; a row without any gives one all the same, of nothing."""
    mesh = run.mesh
    found = engine.forward(batches, fn)
    numbers = torch.cat([batch["numbers"] for batch in batches])
    values = torch.zeros(len(numbers), device=run.device.device)
    if found:
        values = torch.cat([part[: len(batch["numbers"])] for part, batch in zip(found, batches, strict=True)]).float()
    if mesh.sizes.pp > 1:
        dist.broadcast(values, src=mesh.last_stage_rank, group=mesh.groups.pp)
    return dict(zip(numbers.tolist(), values.tolist(), strict=True))
