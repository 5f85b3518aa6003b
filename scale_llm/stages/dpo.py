"""Direct preference optimisation: the policy is moved by pairs of answers, measured against where it started."""

from functools import partial

import numpy as np

from scale_llm.config.stage import DpoConfig, PreferenceLoss, ReferenceModel
from scale_llm.data.chat.preferences import load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.losses.direct_preference import pair_loss
from scale_llm.losses.preference import REFERENCE_FREE
from scale_llm.stages.context import RunContext
from scale_llm.stages.pairs import PairStage
from scale_llm.stages.reference import CachedReference, LiveReference


def dpo(run: RunContext) -> PairStage:
    """The stage the loop drives for `stage=dpo`."""
    stage = run.cfg.stage
    assert isinstance(stage, DpoConfig)
    preferences = load_preferences(run.prepared)
    if stage.loss.value in REFERENCE_FREE:
        return PairStage(run, preferences, loss_of, completed=lambda batch: batch)
    kind = CachedReference if stage.reference is ReferenceModel.cached else LiveReference
    reference = kind(run, preferences.sequences, np.asarray(preferences.groups))

    def completed(batch: Batch) -> Batch:
        return {**batch, "reference": reference.log_probs(batch["numbers"].numpy())}

    return PairStage(run, preferences, loss_of, completed=completed)


def loss_of(run: RunContext):
    """The configured loss as the engine calls it."""
    stage, groups = run.cfg.stage, run.mesh.groups
    assert isinstance(stage, DpoConfig)
    options = {"beta": stage.beta}
    if stage.loss in (PreferenceLoss.cdpo, PreferenceLoss.robust_dpo):
        options["label_smoothing"] = stage.label_smoothing
    if stage.loss is PreferenceLoss.simpo:
        options["margin"] = stage.simpo_gamma
    return partial(
        pair_loss, tp_group=groups.tp, cp_group=groups.cp, vocab_size=run.vocab_size, name=stage.loss.value,
        options=options, length_normalised=stage.length_normalised, sft_coeff=stage.sft_coeff,
    )  # fmt: skip
