"""A reward model: the language model's body and one number for a whole answer, learnt from which of two is better."""

from functools import partial

import numpy as np
import torch

from scale_llm.config.stage import RewardConfig
from scale_llm.data.chat.preferences import load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.losses.reward import pair_reward_loss
from scale_llm.stages.context import RunContext
from scale_llm.stages.pairs import PairStage


def reward(run: RunContext) -> PairStage:
    """The stage the loop drives for `stage=reward`."""
    preferences = load_preferences(run.prepared)
    groups = np.asarray(preferences.groups)
    margins = np.repeat(np.asarray(preferences.margins), np.diff(groups))

    def completed(batch: Batch) -> Batch:
        return {**batch, "margins": torch.from_numpy(margins[batch["numbers"].numpy()])}

    return PairStage(run, preferences, loss_of, completed=completed, whole=True)


def loss_of(run: RunContext):
    """Bradley and Terry's loss as the engine calls it."""
    stage = run.cfg.stage
    assert isinstance(stage, RewardConfig)
    return partial(pair_reward_loss, cp_group=run.mesh.groups.cp, centring=stage.center_rewards_coefficient)
