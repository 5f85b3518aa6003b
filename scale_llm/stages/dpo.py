"""Direct preference optimisation: the policy is moved by pairs of answers, measured against a reference model."""

from functools import partial

import numpy as np

from scale_llm.config.stage import REFERENCE_FREE, DpoConfig, PreferenceLoss
from scale_llm.data.chat.preferences import load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.losses.direct_preference import pair_loss
from scale_llm.losses.sequences import counted_pairs
from scale_llm.stages.context import RunContext
from scale_llm.stages.kto import kto_task
from scale_llm.stages.preference_summary import pair_summary
from scale_llm.stages.reference import reference_of
from scale_llm.stages.sequence_stage import SequenceStage, SequenceTask


def dpo(run: RunContext) -> SequenceStage:
    """The stage the loop drives for `stage=dpo`."""
    stage, preferences = run.cfg.stage, load_preferences(run.prepared)
    assert isinstance(stage, DpoConfig)
    if stage.loss is PreferenceLoss.kto:
        return SequenceStage(run, kto_task(run, stage, preferences))
    groups, complete = np.asarray(preferences.groups), None
    if stage.loss not in REFERENCE_FREE:
        reference = reference_of(run, stage, preferences.sequences, groups)

        def complete(engine, batches: list[Batch]) -> list[Batch]:
            return [{**batch, "reference": reference.log_probs(engine, batch["numbers"].numpy())} for batch in batches]

    return SequenceStage(
        run,
        SequenceTask(
            sequences=preferences.sequences,
            groups=groups,
            loss=loss_of(run, stage),
            counts=counted_pairs,
            complete=complete,
            summary=pair_summary,
            row_tokens=2 * run.cfg.model.seq_length,  # a pair of the longest answers
            numbered=True,
            ends=True,
        ),
    )


def loss_of(run: RunContext, stage: DpoConfig):
    """The configured loss as the engine calls it."""
    options, groups = {"beta": stage.beta}, run.mesh.groups
    if stage.loss in (PreferenceLoss.cdpo, PreferenceLoss.robust_dpo):
        options["label_smoothing"] = stage.label_smoothing
    if stage.loss is PreferenceLoss.simpo:
        options["margin"] = stage.simpo_gamma
    return partial(
        pair_loss, tp_group=groups.tp, cp_group=groups.cp, vocab_size=run.vocab_size, name=stage.loss.value,
        options=options, length_normalised=stage.length_normalised, sft_coeff=stage.sft_coeff,
    )  # fmt: skip
