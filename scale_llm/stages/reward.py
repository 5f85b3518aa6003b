"""A reward model: the language model's body and one number for a whole answer, learnt from which of two is better."""

from functools import partial

import numpy as np
import torch

from scale_llm.config.stage import RewardConfig
from scale_llm.data.chat.preferences import load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.losses.reward import pair_reward_loss
from scale_llm.stages.context import RunContext
from scale_llm.stages.preference_summary import pair_summary
from scale_llm.stages.sequence_stage import SequenceStage, SequenceTask


def reward(run: RunContext) -> SequenceStage:
    """The stage the loop drives for `stage=reward`."""
    stage, preferences = run.cfg.stage, load_preferences(run.prepared)
    assert isinstance(stage, RewardConfig)
    margins = np.repeat(np.asarray(preferences.margins), np.diff(preferences.groups))

    def complete(engine, batches: list[Batch]) -> list[Batch]:
        return [{**batch, "margins": torch.from_numpy(margins[batch["numbers"].numpy()])} for batch in batches]

    return SequenceStage(
        run,
        SequenceTask(
            sequences=preferences.sequences,
            groups=np.asarray(preferences.groups),
            loss=partial(pair_reward_loss, cp_group=run.mesh.groups.cp, centring=stage.center_rewards_coefficient),
            complete=complete,
            summary=pair_summary,
            row_tokens=2 * run.cfg.model.seq_length,  # a pair of the longest answers
            numbered=True,
            whole=True,
            ends=True,
        ),
    )
