"""A reward model: the language model's body and one number for a whole answer, learnt from answers in order."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from scale_llm.config.errors import UserError
from scale_llm.config.stage import RewardConfig, RewardLoss, Score
from scale_llm.data.chat.preferences import Preferences, load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.losses.reward import counted_lists, ranking_loss, reward_loss
from scale_llm.losses.sequences import counted_pairs
from scale_llm.stages.context import RunContext
from scale_llm.stages.preference_summary import calibrated_summary, pair_summary
from scale_llm.stages.sequence_stage import SequenceStage, SequenceTask


def reward(run: RunContext) -> SequenceStage:
    """The stage the loop drives for `stage=reward`."""
    stage, preferences = run.cfg.stage, load_preferences(run.prepared)
    assert isinstance(stage, RewardConfig)
    groups, cp_group = np.asarray(preferences.groups), run.mesh.groups.cp
    loss = partial(reward_loss, cp_group=cp_group, centring=stage.center_rewards_coefficient)
    pairs = SequenceTask(
        sequences=preferences.sequences,
        groups=groups,
        loss=loss,
        counts=counted_pairs,
        held_out_loss=partial(loss, calibrated=True),
        complete=_with_margins(preferences),
        summary=calibrated_summary,
        row_tokens=2 * run.cfg.model.seq_length,  # a pair of the longest answers
        numbered=True,
        whole=True,
        every_token=stage.score is Score.mean_of_tokens,
        ends=True,
    )
    if stage.loss is RewardLoss.bradley_terry:
        return SequenceStage(run, pairs)
    _without_margins(preferences)
    ranking = partial(ranking_loss, cp_group=cp_group)
    lists = replace(
        pairs, loss=ranking, counts=counted_lists, held_out_loss=ranking, complete=_with_lists(groups),
        summary=pair_summary, row_tokens=max(pairs.row_tokens or 0, longest_list(preferences)), ends=False,
    )  # fmt: skip
    return SequenceStage(run, lists)


def longest_list(preferences: Preferences) -> int:
    """Places of a row that the longest list of answers takes."""
    before = np.concatenate([[0], np.cumsum(preferences.sequences.lengths)])
    return int((before[preferences.groups[1:]] - before[preferences.groups[:-1]]).max())


def _with_margins(preferences: Preferences):
    margins = np.repeat(np.asarray(preferences.margins), np.diff(preferences.groups))

    def complete(engine, batches: list[Batch]) -> list[Batch]:
        return [{**batch, "margins": torch.from_numpy(margins[batch["numbers"].numpy()])} for batch in batches]

    return complete


def _with_lists(groups: np.ndarray):
    list_of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))

    def complete(engine, batches: list[Batch]) -> list[Batch]:
        found = []
        for batch in batches:
            changes = np.diff(list_of[batch["numbers"].numpy()], prepend=-1) != 0
            found.append({**batch, "lists": torch.from_numpy(np.cumsum(changes) - 1)})
        return found

    return complete


def _without_margins(preferences: Preferences) -> None:
    count = int(np.count_nonzero(preferences.margins))
    if count:
        raise UserError(
            f"stage.loss=plackett_luce: has no margins, and {count} rows have one; name another field in "
            "data.fields.margin, or set stage.loss=bradley_terry"
        )
