"""The stage that the loop drives for stage=ppo and stage=grpo."""

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.config.policy import GROUPED, KlCtrlType, PolicyStageConfig, PpoConfig
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.chat.prompts import load_prompts
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.engine import Engine, StepResult
from scale_llm.engine.movement import Movement
from scale_llm.losses.advantages import AdaptiveKL
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.policy import guard
from scale_llm.stages.policy.answers import Answers, shared
from scale_llm.stages.policy.batches import Batch, fill
from scale_llm.stages.policy.estimate import estimate, groups_without_signal, token_weights, with_length
from scale_llm.stages.policy.invariants import check_reference
from scale_llm.stages.policy.metrics import table_metrics
from scale_llm.stages.policy.roles import build_roles
from scale_llm.stages.policy.rollout import Draws, Rollout, writes
from scale_llm.stages.policy.scoring import Scorer, Scores
from scale_llm.stages.policy.timing import WAIT, Timing, slowest
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

UNMOVED = StepResult({}, 0.0, None, 0.0, 1.0, skipped=False)
"""Of an actor that an iteration does not train."""


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
        self._draws = Draws(cfg, prompts, split_indices(len(prompts), cfg.data.split, "train"))
        held_out = split_indices(len(prompts), cfg.data.split, "validation")
        self._held_out = Draws(cfg, prompts, held_out, shuffle=False) if len(held_out) else None
        self._rollout = Rollout(run, self._roles.get("rollout", self._roles["actor"]), tokenizer)
        self._scorer = Scorer(run, self._roles.get("reward"), tokenizer)
        self._transcripts = Transcripts(cfg.run_dir, stage.num_samples, tokenizer, self._scorer, writes=writes())
        self._movement: Movement | None = None
        self._iteration = self._drawn = 0
        self._kl = AdaptiveKL(stage.kl_coef, stage.kl_ctrl.target_kl, stage.kl_ctrl.horizon)
        self._rate = 1.0  # of the configured learning rate of the actor

    def start(self, *, fresh: bool) -> Evaluation:
        """The rollout gets the actor's weights. fresh: answers before any training are scored."""
        self._set_rate(self._rate)
        if "rollout" in self._roles:
            self._movement = Movement(
                self.engine, self._roles["rollout"].engine, self._run.mesh.world_group, self._group,
                bucket_bytes=int(self._run.cfg.layout.bucket_megabytes * 2**20), checksum=self._run.cfg.layout.checksum,
            )  # fmt: skip
            self._movement.run()
        for role in self._roles.values():
            if role.is_here and role.offloads:
                role.engine.offload()
        self._transcripts.begin(self._iteration)
        return self.evaluate() if fresh else Evaluation()

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        """One iteration: as many prompts answered, judged and learnt from."""
        began, timing = time.perf_counter(), Timing()
        remarks: list[str] = []
        answers, scores = self._experience(global_batch_size, timing, remarks)
        mask, stage = answers.mask(), self._stage
        parts = {name: parts_of(role, stage, answers) for name, role in self._roles.items()
                 if role.is_here and name in ("actor", "reference", "critic")}  # fmt: skip
        tables = self._looked_at(answers, parts, timing)
        with timing.part("adv"):
            totals = with_length(stage, scores.totals, torch.from_numpy(answers.answer_lengths))
            found = estimate(
                stage, totals, mask, tables["old_log_probs"], reference=tables.get("reference_log_probs"),
                values=tables.get("old_values"), kl_coef=self._kl.coefficient,
            )  # fmt: skip
            tables["advantages"], tables["returns"] = found.advantages, found.returns
            tables["weights"], tables["shares"] = token_weights(stage, mask)
        metrics = table_metrics(answers, mask, totals, found, tables, stage.max_new_tokens)
        metrics["critic/kl_coef"] = self._kl.coefficient
        metrics["reward/failed"] = float(scores.failed)
        metrics |= {f"reward/{name}/mean": float(values.mean()) for name, values in scores.parts.items()}
        if self._iteration == 0:
            check_reference(self._run.cfg, mask, tables)
        teaches = bool(found.advantages.any()) or self._pulled
        results = self._update(parts, tables, global_batch_size, timing, with_actor=teaches)
        moved = self._move(timing)
        told: list[Any] = [None] * dist.get_world_size()
        with timing.part(WAIT):
            dist.all_gather_object(told, results, group=self._group)
        together: dict[str, StepResult] = {}
        for part in told:
            together |= {name: result for name, result in part.items() if name not in together}
        for result in together.values():
            metrics |= result.metrics
        self._follow_kl(mask, tables, len(answers))
        self._iteration += 1
        remarks += [f"reward: {text} ({times} times)" for text, times in sorted(scores.errors.items())]
        broken = guard.broken_limits(stage.guard, metrics)
        self._set_rate(self._rate * guard.act(stage.guard, broken))
        texts = self._transcripts.add(self._iteration, answers, scores, found.advantages)
        timing.seconds["step"] = seconds = time.perf_counter() - began
        dist.all_gather_object(told, timing.seconds, group=self._group)
        metrics |= slowest(told)
        tokens = int(answers.lengths.sum())
        metrics["perf/throughput"] = tokens / seconds / dist.get_world_size()
        if moved is not None:
            metrics["perf/weights_bytes_per_second"] = moved
        actor = together.get("actor") or UNMOVED
        # The actor's loss first: the loop looks at the first loss
        ordered = dict(sorted(metrics.items(), key=lambda item: not item[0].startswith("actor/pg_loss")))
        return replace(
            actor, metrics=ordered, tokens=tokens, remarks=(*remarks, *broken), texts=texts
        )  # fmt: skip

    def _experience(self, size: int, timing: Timing, remarks: list[str]) -> tuple[Answers, Scores]:
        """Answers to `size` prompts with their scores; with filter_groups of prompts that tell answers apart."""
        stage, each = self._stage, self._stage.num_generations_per_prompt
        kept: tuple[Answers, Scores] | None = None
        for _ in range(stage.max_num_gen_batches if stage.filter_groups else 1):
            numbers = list(range(self._drawn, self._drawn + size))
            self._drawn += size
            with timing.part("gen"), self._roles.get("rollout", self._roles["actor"]).at_work():
                answers = self._rollout.sampled(self._draws, numbers)
            with timing.part("reward"):
                scores = self._scorer(answers)
            flat = groups_without_signal(scores.totals, each)
            if not stage.filter_groups:
                if stage.adv_estimator in GROUPED and bool(flat.all()):
                    remarks.append(
                        f"all {each} answers to each of {size} prompts have the same reward: there is no signal in "
                        "this iteration; look at transcripts.jsonl, raise stage.temperature, or set "
                        "stage.filter_groups=true"
                    )
                return answers, scores
            kept = _joined(kept, _of_groups(answers, scores, (~flat).nonzero()[:, 0].tolist(), each))
            groups = len(kept[0]) // each
            if groups >= size:
                return _of_groups(*kept, list(range(size)), each)
        if kept is None or not len(kept[0]):
            raise UserError(
                f"stage.filter_groups=true: of {stage.max_num_gen_batches} batches of {size} prompts none has answers "
                f"of different rewards; look at {self._run.cfg.run_dir}/transcripts.jsonl, change the reward or "
                "the prompts, raise stage.temperature, or train the policy on answers first (stage=sft)"
            )
        remarks.append(
            f"stage.max_num_gen_batches={stage.max_num_gen_batches}: {len(kept[0]) // each} of {size} prompts have "
            "answers of different rewards; the step is of these"
        )
        return kept

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
    ) -> dict[str, StepResult]:
        """Of the roles whose models lie here in part."""
        found, stage = {}, self._stage
        critic, actor = self._roles.get("critic"), self._roles["actor"]
        if critic is not None and critic.is_here:
            assert isinstance(stage, PpoConfig)
            wanted = {name: tables[name] for name in ("old_values", "returns")}
            with timing.part("update_critic"), critic.at_work():
                found["critic"] = train(
                    critic, parts["critic"], wanted, value_loss_of(stage), epochs=stage.ppo_epochs, samples=samples
                )
        if actor.is_here and with_actor and not self._warming_up():
            names = ("old_log_probs", "advantages", "weights", "shares", "reference_log_probs", "sampled_log_probs")
            wanted = {name: tables[name] for name in names if name in tables}
            with timing.part("update_actor"), actor.at_work():
                found["actor"] = train(
                    actor, parts["actor"], wanted, policy_loss_of(actor, stage), epochs=stage.ppo_epochs,
                    samples=samples,
                )  # fmt: skip
        return found

    @property
    def _pulled(self) -> bool:
        """Whether anything but advantages moves the actor. Without either its gradient is 0, and the optimizer's
        momentum and weight decay would move it all the same."""
        return bool(self._stage.kl_loss_coef or self._stage.entropy_coeff)

    def _warming_up(self) -> bool:
        return isinstance(self._stage, PpoConfig) and self._iteration < self._stage.critic_warmup

    def _move(self, timing: Timing) -> float | None:
        """The actor's new weights to the rollout's model; bytes per second."""
        if self._movement is None or self._warming_up():
            return None
        with timing.part("weights"), ExitStack() as stack:
            for name in ("actor", "rollout"):
                stack.enter_context(self._roles[name].at_work())
            moved = self._movement.run()
        return moved.total_bytes / moved.seconds

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
        """Scores of the likeliest answers to prompts that are held out."""
        cfg = self._run.cfg
        if self._held_out is None or not cfg.train.eval_iters:
            return Evaluation()
        count = min(len(self._held_out), cfg.train.eval_iters * cfg.train.global_batch_size)
        with self._roles.get("rollout", self._roles["actor"]).at_work():
            answers = self._rollout.likeliest(self._held_out, list(range(count)))
        scores = self._scorer(answers)
        metrics = {
            "critic/score/mean validation": float(scores.totals.double().mean()),
            "response_length/mean validation": float(answers.answer_lengths.mean()),
        }
        return Evaluation({**metrics, **{
            f"reward/{name}/mean validation": float(values.double().mean()) for name, values in scores.parts.items()
        }})  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self._iteration,
            "drawn_prompts": self._drawn,
            "kl_coef": self._kl.coefficient,
            "learning_rate_factor": self._rate,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._iteration, self._drawn = state["iteration"], state["drawn_prompts"]
        self._kl.coefficient, self._rate = state["kl_coef"], state["learning_rate_factor"]

    def close(self) -> None:
        self._transcripts.close()


def _of_groups(answers: Answers, scores: Scores, groups: list[int], each: int) -> tuple[Answers, Scores]:
    """The answers to some of the prompts."""
    numbers = [group * each + place for group in groups for place in range(each)]
    parts = {name: values[numbers] for name, values in scores.parts.items()}
    return answers.chosen(numbers), replace(scores, totals=scores.totals[numbers], parts=parts)


def _joined(
    before: tuple[Answers, Scores] | None, more: tuple[Answers, Scores]
) -> tuple[Answers, Scores]:  # fmt: skip
    if before is None:
        return more
    (answers, scores), (new, found) = before, more
    return answers.joined(new), Scores(
        torch.cat([scores.totals, found.totals]),
        {name: torch.cat([scores.parts[name], found.parts[name]]) for name in scores.parts},
        scores.failed + found.failed,
        {text: scores.errors.get(text, 0) + found.errors.get(text, 0) for text in {**scores.errors, **found.errors}},
    )
