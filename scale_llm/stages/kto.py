"""KTO (Ethayarajh et al. 2024): the policy is moved by single answers that are desirable or not.

How far it is from its reference altogether, the reference point z0, is estimated before every step from the prompts of
the whole global batch beside answers of other prompts, under the policy as it is then, without gradients. The paper's
authors take a micro-batch; of the global batch the gradient depends on no split into micro-batches or ranks.
"""

from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.config.stage import DpoConfig
from scale_llm.data.chat.preferences import Preferences
from scale_llm.data.mismatched import WithMismatched
from scale_llm.data.sequence_loader import Batch
from scale_llm.data.units import single_units
from scale_llm.engine.engine import Engine
from scale_llm.losses.direct_preference import counted_answers, unpaired_loss
from scale_llm.losses.preference import kto_reference_point
from scale_llm.stages.context import RunContext
from scale_llm.stages.preference_summary import answer_summary
from scale_llm.stages.reference import Reference, reference_of
from scale_llm.stages.sequence_stage import SequenceTask
from scale_llm.stages.sequence_values import log_probs_of


def kto_task(run: RunContext, stage: DpoConfig, preferences: Preferences) -> SequenceTask:
    """What SequenceStage needs for stage.loss=kto."""
    assert preferences.labels is not None, "unpaired data"
    sequences = WithMismatched(preferences.sequences, run.cfg.model.seq_length)
    reference = reference_of(run, stage, sequences, single_units(len(sequences.lengths)))
    desirable = np.asarray(preferences.labels).astype(bool)

    def complete(engine: Engine, batches: list[Batch]) -> list[Batch]:
        numbers = np.concatenate([batch["numbers"].numpy() for batch in batches])
        weights = torch.cat([batch["sequence_weights"] for batch in batches]).double()
        kl = _reference_point(run, engine, sequences, reference, numbers, weights)
        found = []
        for batch in batches:
            own = batch["numbers"].numpy()
            answers = {"reference": reference.log_probs(engine, own), "desirable": torch.from_numpy(desirable[own])}
            found.append({**batch, **answers, "kl": kl})
        return found

    groups = run.mesh.groups
    return SequenceTask(
        sequences=sequences,
        groups=single_units(len(preferences.sequences)),
        loss=partial(
            unpaired_loss, tp_group=groups.tp, cp_group=groups.cp, vocab_size=run.vocab_size, beta=stage.beta,
            desirable_weight=stage.desirable_weight, undesirable_weight=stage.undesirable_weight,
        ),
        counts=counted_answers,
        complete=complete,
        summary=answer_summary,
        numbered=True,
    )  # fmt: skip


def _reference_point(
    run: RunContext, engine: Engine, sequences: WithMismatched, reference: Reference, numbers: np.ndarray,
    weights: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """z0 of the global batch of which this replica has these sequences, their prompts weighted."""
    others = [sequences.mismatched(int(number)) for number in numbers]
    policy = log_probs_of(
        run, engine, sequences, [[number] for number in others], row_tokens=run.cfg.model.seq_length
    )  # fmt: skip
    frozen = reference.log_probs(engine, np.array(others, dtype=np.int64)).double()
    mine = torch.tensor([policy[number] for number in others], dtype=torch.float64)
    total = torch.stack([((mine - frozen) * weights).sum(), weights.sum()]).to(run.device.device)
    dist.all_reduce(total, group=run.mesh.groups.dp)
    return kto_reference_point(total[0], total[1]).float()
