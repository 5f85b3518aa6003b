"""Log-probabilities of whole answers under a model as it is now, without gradients and dropout."""

from functools import partial

import torch
import torch.distributed as dist

from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.engine.engine import Engine
from scale_llm.losses.direct_preference import answer_log_probs
from scale_llm.stages.context import RunContext
from scale_llm.stages.sequences import rows_of


def log_probs_of(
    run: RunContext, engine: Engine, sequences: TokenSequences, samples: list[list[int]], *, row_tokens: int = 0
) -> dict[int, float]:
    """Of the answer of every sequence, by its number; FP32, in nats, summed over its tokens.

    samples: see rows_of. row_tokens: samples share rows of so many; 0: no more than the longest takes. Every rank of a
    data-parallel replica gives the same samples and gets the same values.
    """
    mesh = run.mesh
    fn = partial(answer_log_probs, tp_group=mesh.groups.tp, cp_group=mesh.groups.cp, vocab_size=run.vocab_size)
    batches = rows_of(run.cfg, mesh, sequences, samples, row_tokens=row_tokens)
    found = engine.forward(batches, lambda logits, placed: fn(logits, placed)[0])
    numbers = torch.cat([batch["numbers"] for batch in batches])
    values = torch.zeros(len(numbers), device=run.device.device)
    if found:  # an empty row has a value all the same, of nothing
        values = torch.cat([part[: len(batch["numbers"])] for part, batch in zip(found, batches, strict=True)]).float()
    if mesh.sizes.pp > 1:
        dist.broadcast(values, src=mesh.last_stage_rank, group=mesh.groups.pp)
    return dict(zip(numbers.tolist(), values.tolist(), strict=True))
