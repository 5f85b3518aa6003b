"""The optimizer steps of an iteration: mini-batches of answers, as often as asked, through one role's engine."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from scale_llm.config.policy import PolicyLoss, PolicyStageConfig, PpoConfig
from scale_llm.data.sequence_loader import Batch
from scale_llm.engine.engine import Loss, StepResult
from scale_llm.losses.policy_batch import (
    answer_token_log_probs,
    answer_token_values,
    counted_shares,
    counted_values,
    policy_batch_loss,
    value_batch_loss,
)
from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.batches import Values, rows_of_role, with_tables
from scale_llm.stages.policy.invariants import check_first_ratio
from scale_llm.stages.policy.roles import Role


def mini_batches(stage: PolicyStageConfig, answers: Answers) -> list[list[int]]:
    """Numbers of the answers of each optimizer step."""
    prompts = len(answers) // stage.num_generations_per_prompt
    size = (stage.ppo_mini_batch_size or prompts) * stage.num_generations_per_prompt
    return [list(range(first, min(first + size, len(answers)))) for first in range(0, len(answers), size)]


def parts_of(role: Role, stage: PolicyStageConfig, answers: Answers) -> list[list[Batch]]:
    """The role's micro-batches of every mini-batch. The same ones give old log-probabilities and the update, so that
    the first ratio is 1 to the last bit."""
    return [
        rows_of_role(role, answers, numbers, stage.max_tokens_per_micro_batch)
        for numbers in mini_batches(stage, answers)
    ]  # fmt: skip


def log_probs_fn(role: Role, stage: PolicyStageConfig) -> Values:
    """Of the tokens of answers by this role's model, at the sampling temperature."""
    return partial(
        answer_token_log_probs, tp_group=role.run.mesh.groups.tp, vocab_size=role.run.vocab_size,
        temperature=stage.temperature,
    )  # fmt: skip


VALUES_FN: Values = answer_token_values


def policy_loss_of(role: Role, stage: PolicyStageConfig) -> Loss:
    """The configured loss of the actor, as the engine calls it."""
    groups = role.run.mesh.groups
    return partial(
        policy_batch_loss,
        tp_group=groups.tp,
        cp_group=groups.cp,
        vocab_size=role.run.vocab_size,
        temperature=stage.temperature,
        clip_low=stage.clip_ratio,
        clip_high=stage.clip_ratio if stage.clip_ratio_high is None else stage.clip_ratio_high,
        dual_clip=stage.clip_ratio_c,
        of_sequences=stage.policy_loss is PolicyLoss.gspo,
        entropy_coeff=stage.entropy_coeff,
        kl=stage.kl_loss_type.value if stage.kl_loss_coef else None,
        kl_coef=stage.kl_loss_coef,
        importance_cap=stage.tis_imp_ratio_cap,
    )


def value_loss_of(stage: PpoConfig) -> Loss:
    """That of the critic."""
    return partial(value_batch_loss, clip=stage.cliprange_value)


def train(
    role: Role, parts: list[list[Batch]], tables: dict[str, torch.Tensor], loss: Loss, *, epochs: int, samples: int
) -> StepResult:
    """One step for each mini-batch and epoch. samples: of the iteration, which the learning rate's schedule counts.

    The result has the means over the steps, under the role's names; those whose numbers are none change nothing.
    """
    made = [with_tables(batches, tables) for batches in parts]
    steps, results = epochs * len(made), []
    counts = counted_values if role.name == "critic" else counted_shares
    for number in range(steps):
        counted = (number + 1) * samples // steps - number * samples // steps
        result = role.engine.train_step(made[number % len(made)], loss, samples=counted, counts=counts)
        if role.name == "actor" and not number and result.broken is None:
            check_first_ratio(role.cfg, result.metrics)
        results.append(result)
    return _mean(role, results)


def _mean(role: Role, results: list[StepResult]) -> StepResult:
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    good = [result for result in results if result.broken is None]
    broken = [result.broken for result in results if result.broken is not None]
    metrics = {name: mean([result.metrics[name] for result in good]) for name in (good[0].metrics if good else ())}
    norms = [result.grad_norm for result in good if result.grad_norm is not None]
    metrics[f"{role.name}/grad_norm"] = mean(norms) if norms else 0.0
    metrics[f"{role.name}/lr"] = results[-1].learning_rate
    return replace(
        results[-1], metrics=metrics, grad_norm=metrics[f"{role.name}/grad_norm"],
        skipped=all(result.skipped for result in results),
        broken=f"{role.name}: {broken[0]} in {len(broken)} of {len(results)} optimizer steps" if broken else None,
    )  # fmt: skip
