"""Answers to new prompts with their scores: what an iteration learns from."""

from dataclasses import replace

import torch

from scale_llm.config.errors import UserError
from scale_llm.config.policy import GROUPED, AdvEstimator, PolicyStageConfig
from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.estimate import groups_without_signal
from scale_llm.stages.policy.prompts import Draws
from scale_llm.stages.policy.rollout import Rollout
from scale_llm.stages.policy.scoring import Scorer, Scores
from scale_llm.stages.policy.timing import Timing

Judged = tuple[Answers, Scores]


class NoSignal(UserError):
    """No prompt has answers that differ in reward."""


class Experience:
    """Draws prompts in their order; `drawn` is the place in it, saved with checkpoints."""

    def __init__(self, stage: PolicyStageConfig, draws: Draws, rollout: Rollout, scorer: Scorer):
        self._stage, self._draws, self._rollout, self._scorer = stage, draws, rollout, scorer
        self.drawn = 0

    def of_prompts(self, size: int, timing: Timing, remarks: list[str]) -> Judged:
        """Answers to `size` prompts with their scores; with filter_groups to prompts that tell their answers apart.

        Raises:
            NoSignal: with filter_groups, on every rank: there are none.
        """
        if self._stage.filter_groups:
            return self._filtered(size, timing, remarks)
        return self._next(size, timing)

    def leave_out(self, size: int) -> None:
        """The prompts of an iteration, with filter_groups as many as one may draw: a broken one's do not come again."""
        self.drawn += size * (self._stage.max_num_gen_batches if self._stage.filter_groups else 1)

    def _next(self, size: int, timing: Timing) -> Judged:
        numbers = list(range(self.drawn, self.drawn + size))
        self.drawn += size
        answers = self._rollout.sampled(self._draws, numbers, timing)
        with timing.part("reward"):
            return answers, self._scorer(answers)

    def _filtered(self, size: int, timing: Timing, remarks: list[str]) -> Judged:
        """DAPO's dynamic sampling (Yu et al. 2025, section 3.2)."""
        stage, each = self._stage, self._stage.num_generations_per_prompt
        kept: Judged | None = None
        for batch in range(1, stage.max_num_gen_batches + 1):
            answers, scores = self._next(size, timing)
            telling = (~groups_without_signal(scores.totals, each)).nonzero()[:, 0].tolist()
            kept = _joined(kept, _of_groups(answers, scores, telling, each))
            if len(kept[0]) >= size * each:
                remarks.append(f"{batch} batches of {size} prompts were drawn") if batch > 1 else None
                return _of_groups(*kept, list(range(size)), each)
        if kept is None or not len(kept[0]):
            raise NoSignal(
                f"stage.filter_groups=true: of {stage.max_num_gen_batches} batches of {size} prompts none has answers "
                "of different rewards; change the reward or the prompts, raise stage.temperature, or train the policy "
                "on answers first (stage=sft)"
            )
        remarks.append(
            f"stage.max_num_gen_batches={stage.max_num_gen_batches}: {len(kept[0]) // each} of {size} prompts have "
            "answers of different rewards; the step is of these"
        )
        return kept


def without_signal(stage: PolicyStageConfig, advantages: torch.Tensor, *, moves: bool) -> list[str]:
    """What to say where no answer is better than another. advantages: [n, t]; moves: whether the actor is updated."""
    if stage.adv_estimator is AdvEstimator.gae or bool(advantages.any()):
        return []
    count, each = len(advantages), stage.num_generations_per_prompt
    grouped = stage.adv_estimator in GROUPED
    which = f"all {each} answers to each of {count // each} prompts" if grouped else f"all {count} answers"
    alone = ", and stage.kl_loss_coef and stage.entropy_coeff alone move the actor" if moves else ""
    return [
        f"{which} have the same reward: there is no signal in this iteration{alone}; look at transcripts.jsonl, or "
        f"raise stage.temperature{', or set stage.filter_groups=true' if each > 1 else ''}"
    ]


def _of_groups(answers: Answers, scores: Scores, groups: list[int], each: int) -> Judged:
    """The answers to some of the prompts."""
    numbers = [group * each + place for group in groups for place in range(each)]
    parts = {name: values[numbers] for name, values in scores.parts.items()}
    return answers.chosen(numbers), replace(scores, totals=scores.totals[numbers], parts=parts)


def _joined(before: Judged | None, more: Judged) -> Judged:
    if before is None:
        return more
    (answers, scores), (new, found) = before, more
    names = dict.fromkeys([*scores.parts, *found.parts])  # functions may name other numbers each time
    parts = {
        name: torch.cat([
            scores.parts.get(name, torch.zeros(len(answers))), found.parts.get(name, torch.zeros(len(new)))
        ])
        for name in names
    }  # fmt: skip
    errors = {
        text: scores.errors.get(text, 0) + found.errors.get(text, 0) for text in {**scores.errors, **found.errors}
    }
    return answers.joined(new), Scores(
        torch.cat([scores.totals, found.totals]), parts, scores.failed + found.failed, errors
    )  # fmt: skip
