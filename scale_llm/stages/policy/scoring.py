"""What answers are worth: functions of the user's and our own, dealt out over all ranks, and a reward model."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.data import FieldsConfig
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.rewards.scoring import Item, Rewards
from scale_llm.stages.context import RunContext
from scale_llm.stages.generate import text_of
from scale_llm.stages.policy.answers import Answers, gathered, shared
from scale_llm.stages.policy.roles import Role
from scale_llm.stages.sequence_values import scores_of

MODEL = "reward_model"


@dataclass(frozen=True, slots=True)
class Scores:
    """totals: FP32 [n]. parts: of each reward by its name, FP32 [n]. failed: functions that raised, over all
    answers. errors: what they raised, and how often."""

    totals: torch.Tensor
    parts: dict[str, torch.Tensor]
    failed: int
    errors: dict[str, int]


class Scorer:
    """Scores of answers, the same on every rank of the job."""

    def __init__(self, run: RunContext, model: Role | None, tokenizer: Tokenizer):
        reward = run.cfg.reward
        self._group, self._model, self._weight = run.mesh.host_group, model, reward.load_weight
        self._fields, self._tokenizer = run.cfg.data.fields, tokenizer
        self._functions = Rewards(reward) if reward.function is not None else None

    def __call__(self, answers: Answers) -> Scores:
        """A collective of the whole job."""
        scores = self._by_functions(answers)
        if self._model is None:
            return scores
        judged = self._by_model(answers)
        return Scores(
            scores.totals + self._weight * judged, {**scores.parts, MODEL: judged}, scores.failed, scores.errors
        )  # fmt: skip

    def text(self, answers: Answers, number: int) -> str:
        """An answer without the token that ended it."""
        return text_of(answers.completions[number], self._tokenizer)

    def _by_functions(self, answers: Answers) -> Scores:
        if self._functions is None:
            return Scores(torch.zeros(len(answers)), {}, 0, {})
        mine = list(range(dist.get_rank(), len(answers), dist.get_world_size()))
        found = self._functions.score([self._item(answers, number) for number in mine])
        every = gathered(dict(zip(mine, found, strict=True)), self._group)
        every_error = gathered({dist.get_rank(): dict(self._functions.errors)}, self._group)
        self._functions.errors.clear()
        errors: dict[str, int] = {}
        for part in every_error.values():
            for text, times in part.items():
                errors[text] = errors.get(text, 0) + times
        in_order = [every[number] for number in range(len(answers))]
        names = dict.fromkeys(name for scored in in_order for name in scored.parts)
        parts = {name: torch.tensor([scored.parts.get(name, 0.0) for scored in in_order]) for name in names}
        totals = torch.tensor([scored.value for scored in in_order], dtype=torch.float32)
        return Scores(totals, parts, sum(scored.failed for scored in in_order), errors)

    def _item(self, answers: Answers, number: int) -> Item:
        row, completion = answers.prompts[number].row, answers.completions[number]
        extra = row.get(self._fields.extra_info)
        told = {"num_tokens": len(completion.tokens), "finished": completion.finished}
        return Item(
            data_source=row.get(self._fields.data_source, ""),
            answer=self.text(answers, number),
            ground_truth=ground_truth(row, self._fields),
            extra_info={**(extra if isinstance(extra, dict) else {}), **told},
        )

    def _by_model(self, answers: Answers) -> torch.Tensor:
        """[n], by the reward model."""
        found = torch.zeros(len(answers))
        role = self._model
        if role.is_here:
            mesh = role.run.mesh
            mine = list(range(mesh.dp_rank, len(answers), mesh.sizes.dp))
            with role.at_work():
                values = scores_of(role.run, role.engine, answers, mine)
            if role.speaks and mesh.cp_rank == 0:
                for number, value in values.items():
                    found[number] = value
        return shared({MODEL: found}, self._group)[MODEL]


def ground_truth(row: dict[str, Any], fields: FieldsConfig) -> Any:
    """What a row says is right."""
    return row.get(fields.ground_truth, row.get(fields.label))
