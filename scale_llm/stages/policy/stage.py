"""The stage that the loop drives for stage=ppo and stage=grpo."""

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.config.policy import KlCtrlType, PolicyStageConfig, PpoConfig
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.chat.prompts import load_prompts
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.engine import Engine, Loss, StepResult
from scale_llm.engine.movement import Movement
from scale_llm.losses.advantages import AdaptiveKL
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.policy import guard
from scale_llm.stages.policy.answers import Answers, shared
from scale_llm.stages.policy.batches import Batch, fill
from scale_llm.stages.policy.estimate import estimate, token_weights, with_length
from scale_llm.stages.policy.experience import Experience, NoSignal, without_signal
from scale_llm.stages.policy.invariants import BrokenInvariant, check_reference, without_numbers
from scale_llm.stages.policy.metrics import table_metrics
from scale_llm.stages.policy.prompts import Draws
from scale_llm.stages.policy.roles import Role, build_roles, movement_to_rollout
from scale_llm.stages.policy.rollout import Rollout
from scale_llm.stages.policy.scoring import Scorer
from scale_llm.stages.policy.timing import PREFIX, WAIT, Timing, over_ranks
from scale_llm.stages.policy.transcripts import Transcripts
from scale_llm.stages.policy.updates import (
    VALUES_FN,
    log_probs_fn,
    parts_of,
    policy_loss_of,
    train,
    value_loss_of,
)

Tables = dict[str, torch.Tensor]

TABLES_OF = {
    "actor": ("old_log_probs", "advantages", "weights", "shares", "reference_log_probs", "sampled_log_probs"),
    "critic": ("old_values", "returns"),
}
"""What the loss of a role reads."""


class PolicyStage:
    """Rollout, scores, log-probabilities and values, advantages, updates."""

    def __init__(self, run: RunContext):
        cfg, stage = run.cfg, run.cfg.stage
        assert isinstance(stage, PolicyStageConfig)
        self._run, self._stage = run, stage
        self._group = run.mesh.host_group
        self._roles = build_roles(run)
        self.engine = self._roles["actor"].engine
        self.engines: dict[str, Engine | None] = {"": self.engine}
        if "critic" in self._roles:
            self.engines["critic"] = self._roles["critic"].engine
        tokenizer = Tokenizer.load(run.prepared.tokenizer_path, cfg.tokenizer.eod_token)
        prompts = load_prompts(run.prepared)
        draws = Draws(cfg, prompts, split_indices(len(prompts), cfg.data.split, "train"))
        if not len(draws):
            raise UserError(
                f"data.split={cfg.data.split}: leaves none of {len(prompts)} prompts for training; give more"
            )
        held_out = split_indices(len(prompts), cfg.data.split, "validation")
        self._held_out = Draws(cfg, prompts, held_out, shuffle=False) if len(held_out) else None
        self._rollout = Rollout(run, self._roles.get("rollout", self._roles["actor"]), tokenizer)
        self._scorer = Scorer(run, self._roles.get("reward"), tokenizer)
        self._experience = Experience(stage, draws, self._rollout, self._scorer)
        writes = dist.get_rank() == dist.get_world_size() - 1  # as the Reporter
        self._transcripts = Transcripts(cfg.run_dir, stage.num_samples, tokenizer, self._scorer, writes=writes)
        self._movement: Movement | None = None
        self._iteration, self._was_broken = 0, False
        self._kl = AdaptiveKL(stage.kl_coef, stage.kl_ctrl.target_kl, stage.kl_ctrl.horizon)
        self._rate = 1.0  # of the configured learning rate of the actor

    def start(self, *, fresh: bool) -> Evaluation:
        """The rollout gets the actor's weights. fresh: answers before any training are scored."""
        self._set_rate(self._rate)
        if "rollout" in self._roles:
            self._movement = movement_to_rollout(self._run, self._roles)
        for role in self._roles.values():
            if role.is_here and role.offloads:
                role.engine.offload()
        self._transcripts.begin(self._iteration)
        return self.evaluate() if fresh else Evaluation()

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        """One iteration: as many prompts are answered, judged and learnt from."""
        began, timing = time.perf_counter(), Timing()
        remarks: list[str] = []
        stage = self._stage
        try:
            answers, scores = self._experience.of_prompts(global_batch_size, timing, remarks)
        except NoSignal as found_none:
            if not self._iteration:
                raise
            return self._without_update(None, remarks, stop=tuple(found_none.problems))
        mask = answers.mask()
        parts = {
            name: parts_of(role, stage, answers)
            for name, role in self._roles.items()
            if role.is_here and name in ("actor", "reference", "critic")
        }
        tables = self._looked_at(answers, parts, timing)
        if no_number := without_numbers(tables, scores.totals):
            return self._without_update(no_number, remarks)
        with timing.part("adv"):
            totals = with_length(stage, scores.totals, torch.from_numpy(answers.answer_lengths))
            found = estimate(
                stage, totals, mask, tables["old_log_probs"], reference=tables.get("reference_log_probs"),
                values=tables.get("old_values"), kl_coef=self._kl.coefficient,
            )  # fmt: skip
            tables["advantages"], tables["returns"] = found.advantages, found.returns
            tables["weights"], tables["shares"] = token_weights(stage, mask)
        metrics = {
            **table_metrics(answers, mask, totals, found, tables),
            "critic/kl_coef": self._kl.coefficient,
            "actor/lr_factor": self._rate,
            "reward/failed": float(scores.failed),
            **{f"reward/{name}/mean": float(values.double().mean()) for name, values in scores.parts.items()},
        }
        if self._iteration == 0:
            check_reference(self._run.cfg, mask, tables)
            remarks += self._stop_strings(answers)
        moves = not self._is_warming_up and (bool(found.advantages.any()) or self._is_pulled)
        remarks += without_signal(stage, found.advantages, moves=moves)
        results = self._together(self._update(parts, tables, global_batch_size, timing, with_actor=moves), timing)
        if moves:
            metrics |= self._move(timing)
        metrics |= {name: value for result in results.values() for name, value in result.metrics.items()}
        self._follow_kl(mask, tables, len(answers))
        self._iteration += 1
        broken = guard.broken_limits(stage.guard, metrics)
        self._set_rate(self._rate * guard.rate_factor(stage.guard, broken=bool(broken), before=self._was_broken))
        self._was_broken = bool(broken)
        remarks += [f"reward: {text} ({times} times)" for text, times in sorted(scores.errors.items())] + broken
        texts = self._transcripts.add(self._iteration, answers, totals, scores.parts, found.advantages)
        tokens = int(answers.lengths.sum())
        metrics |= self._times(timing, time.perf_counter() - began, tokens)
        # The actor's loss first: the loop looks at the first loss
        ordered = dict(sorted(metrics.items(), key=lambda item: item[0] != "actor/pg_loss"))
        stop = guard.stops(stage.guard, broken)
        no_number = "; ".join(result.broken for result in results.values() if result.broken) or None
        return replace(
            results["actor"], metrics=ordered, tokens=tokens, remarks=tuple(remarks), texts=texts, stop=stop,
            broken=no_number,
        )  # fmt: skip

    def leave_out(self, global_batch_size: int) -> None:
        self._iteration += 1
        self._experience.leave_out(global_batch_size)

    def _without_update(
        self, no_number: str | None, remarks: list[str], stop: tuple[str, ...] = ()
    ) -> StepResult:  # fmt: skip
        """Of an iteration that nothing can be learnt from."""
        self._iteration += 1
        rate = 0.0 if self.engine is None else self.engine.learning_rate
        return StepResult(
            {}, None, None, rate, 1.0, skipped=True, broken=no_number, remarks=tuple(remarks), stop=stop
        )  # fmt: skip

    def _stop_strings(self, answers: Answers) -> list[str]:
        """Said once, of the first answers."""
        strings = self._stage.stop_strings
        if not strings or self._rollout.ended_by_string(answers):
            return []
        return [f"stage.stop_strings={strings}: none of them has ended any of the first {len(answers)} answers"]

    def _together(self, mine: dict[str, StepResult | list[str]], timing: Timing) -> dict[str, StepResult]:
        """What every role's first rank has found, on all ranks.

        Raises:
            UserError: on all ranks: what any role has found wrong.
        """
        told: list[Any] = [None] * dist.get_world_size(self._group)
        with timing.part(WAIT):
            dist.all_gather_object(told, mine, group=self._group)
        found: dict[str, StepResult] = {}
        problems: list[str] = []
        for name, result in (pair for part in told for pair in part.items()):
            if isinstance(result, list):
                problems += result
            else:
                found.setdefault(name, result)
        if problems:
            raise UserError(list(dict.fromkeys(problems)))
        return found

    def _times(self, timing: Timing, seconds: float, tokens: int) -> dict[str, float]:
        timing.seconds["step"] = seconds
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, timing.seconds, group=self._group)
        metrics = over_ranks(told)
        metrics["perf/throughput"] = tokens / metrics[f"{PREFIX}step"] / len(told)
        return metrics

    def _looked_at(self, answers: Answers, parts: dict[str, list[list[Batch]]], timing: Timing) -> Tables:
        """What actor, reference and critic say of every token before the update."""
        shape = answers.mask().shape
        tables: Tables = {}
        looks = (
            ("actor", "old_log_probs", "old_log_prob"),
            ("reference", "reference_log_probs", "ref"),
            ("critic", "old_values", "values"),
        )
        for name, table, part in looks:
            role = self._roles.get(name)
            if role is None:
                continue
            tables[table] = torch.zeros(shape)
            if role.is_here:
                fn = VALUES_FN if name == "critic" else log_probs_fn(role, self._stage)
                with timing.part(part), role.at_work():
                    fill(tables[table], role, parts[name], fn)
        with timing.part(WAIT):
            shared(tables, self._group)
        return {**tables, "sampled_log_probs": answers.sampled_log_probs()}

    def _update(
        self, parts: dict[str, list[list[Batch]]], tables: Tables, samples: int, timing: Timing, *, with_actor: bool
    ) -> dict[str, StepResult | list[str]]:
        """Of the roles whose models lie here in part: the means of their optimizer steps, or problems."""
        found: dict[str, StepResult | list[str]] = {}
        critic, actor, stage = self._roles.get("critic"), self._roles["actor"], self._stage
        if critic is not None and critic.is_here:
            assert isinstance(stage, PpoConfig)
            with timing.part("update_critic"), critic.at_work():
                found["critic"] = self._trained(critic, parts, tables, value_loss_of(stage), samples)
        if actor.is_here and with_actor:
            with timing.part("update_actor"), actor.at_work():
                found["actor"] = self._trained(actor, parts, tables, policy_loss_of(actor, stage), samples)
        elif actor.is_here:
            found["actor"] = StepResult({}, 0.0, None, actor.engine.learning_rate, 1.0, skipped=False)
        return found

    def _trained(
        self, role: Role, parts: dict[str, list[list[Batch]]], tables: Tables, loss: Loss, samples: int
    ) -> StepResult | list[str]:
        """Ranks of other roles do not see what goes wrong here and must not be left waiting: it is told, not raised."""
        wanted = {name: tables[name] for name in TABLES_OF[role.name] if name in tables}
        try:
            return train(role, parts[role.name], wanted, loss, epochs=self._stage.ppo_epochs, samples=samples)
        except BrokenInvariant as error:
            return [str(error)]

    @property
    def _is_pulled(self) -> bool:
        """Whether anything but advantages moves the actor. Without either its gradient is 0, and the optimizer's
        momentum and weight decay would move it all the same."""
        return bool(self._stage.kl_loss_coef or self._stage.entropy_coeff)

    @property
    def _is_warming_up(self) -> bool:
        return isinstance(self._stage, PpoConfig) and self._iteration < self._stage.critic_warmup

    def _move(self, timing: Timing) -> dict[str, float]:
        """The actor's new weights to the rollout's model, where it has one of its own."""
        if self._movement is None:
            return {}
        with timing.part(WAIT):  # not for the movement's account
            dist.barrier(self._group)
        with timing.part("weights"), self._roles["actor"].at_work(), self._roles["rollout"].at_work():
            moved = self._movement.run()
        return {"perf/weights_bytes_per_second": moved.total_bytes / moved.seconds}

    def _follow_kl(self, mask: torch.Tensor, tables: Tables, count: int) -> None:
        if self._stage.kl_ctrl.type is not KlCtrlType.adaptive:
            return
        apart = torch.where(mask, tables["old_log_probs"] - tables["reference_log_probs"], 0)
        self._kl.update(float(apart.double().sum(-1).mean()), count)

    def _set_rate(self, factor: float) -> None:
        self._rate = factor
        if self.engine is not None:
            self.engine.scale_learning_rate(factor)

    def evaluate(self) -> Evaluation:
        """Scores of answers to prompts that are held out."""
        cfg = self._run.cfg
        if self._held_out is None or not cfg.train.eval_iters:
            return Evaluation()
        count = min(len(self._held_out), cfg.train.eval_iters * cfg.train.global_batch_size)
        answers = self._rollout.held_out(self._held_out, list(range(count)))
        scores = self._scorer(answers)
        metrics = {
            "critic/score/mean validation": float(scores.totals.double().mean()),
            "response_length/mean validation": float(answers.answer_lengths.mean()),
        }
        parts = {f"reward/{name}/mean validation": float(v.double().mean()) for name, v in scores.parts.items()}
        remarks = [f"reward: {text} ({times} times)" for text, times in sorted(scores.errors.items())]
        return Evaluation({**metrics, **parts}, remarks=remarks)

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self._iteration,
            "drawn_prompts": self._experience.drawn,
            "kl_coef": self._kl.coefficient,
            "learning_rate_factor": self._rate,
            "limit_broken": self._was_broken,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._iteration, self._was_broken = state["iteration"], state["limit_broken"]
        self._experience.drawn = state["drawn_prompts"]
        self._kl.coefficient, self._rate = state["kl_coef"], state["learning_rate_factor"]

    def close(self) -> None:
        self._transcripts.close()
