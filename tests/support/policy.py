"""Whole runs of stage=ppo and stage=grpo of which every rank remembers more than a run writes.

Legend: n answers, t tokens of the longest.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scale_llm.engine.engine import Engine
from scale_llm.losses.policy_batch import answer_token_log_probs
from scale_llm.stages.policy import stage as policy_stage
from scale_llm.stages.policy import updates
from scale_llm.stages.policy.rollout import Rollout
from scale_llm.stages.policy.scoring import Scorer
from scale_llm.stages.policy.stage import PolicyStage
from support import stage
from support.batches import samples
from support.training import config, make_engine, micro_batches

WORDS = ["model=from_checkpoint", "model.seq_length=64", "data.split='100,0,0'", "train.global_batch_size=8",
         "train.train_iters=1", "train.eval_interval=null", "optim.lr_warmup_iters=0", "stage.max_new_tokens=12",
         "stage.stop_strings=['e']", "reward.function=length", "reward.length_target_tokens=6",
         "stage.num_samples=0"]  # fmt: skip
"""Answers end with the first e, so that their lengths differ."""


def write_prompts(path: Path) -> Path:
    """Sums of unequal lengths."""
    with open(path, "w") as file:
        for a in range(6):
            for b in range(4):
                file.write(json.dumps({"prompt": f"{a} and {b}?" * (1 + a % 3), "label": str(a + b)}) + "\n")
    return path


def run(run_dir: str, fault: str | None = None) -> dict[str, Any]:
    """The run's end (`problems`, or `error` where it raised) and, of its iterations:

    `answers`: {prompt, tokens, log_probs, finished, draw} each; `scores`: name -> [n]; `tables`: name -> [n, t];
    `steps`: role -> optimizer steps, {metrics, grad_norm, learning_rate, answers}, the last the numbers of the answers
    in each micro-batch of this rank; `looks`: the micro-batches of the passes before, the same way.

    fault: which of FAULTS to plant first.
    """
    seen: dict[str, Any] = {"answers": [], "scores": [], "tables": [], "steps": {}, "looks": {}, "away": []}
    _watch(seen)
    if fault is not None:
        FAULTS[fault]()
    try:
        seen["problems"] = stage.run(run_dir)
    except RuntimeError as error:
        seen["error"] = str(error)
    return seen


def _watch(seen: dict[str, Any]) -> None:
    sampled, judged, update, train, step = (
        Rollout.sampled, Scorer.__call__, PolicyStage._update, updates.train, Engine.train_step
    )  # fmt: skip
    role_at_work: list[str] = []
    roles: dict[str, Any] = {}

    def watched_sampled(self, draws, numbers, timing):
        answers = sampled(self, draws, numbers, timing)
        seen["answers"].append([
            {"prompt": answers.prompts[n].tokens, "tokens": answers.completions[n].tokens,
             "log_probs": answers.completions[n].log_probs, "finished": answers.completions[n].finished,
             "draw": answers.draws[n]}
            for n in range(len(answers))
        ])  # fmt: skip
        return answers

    def watched_judged(self, answers):
        scores = judged(self, answers)
        seen["scores"].append({"total": scores.totals.clone(), **scores.parts})
        return scores

    def watched_update(self, parts, tables, samples, timing, **options):
        roles.update(self._roles)
        seen["tables"].append({name: table.clone() for name, table in tables.items()})
        for name, batches in parts.items():
            seen["looks"].setdefault(name, []).append([_numbers(part) for part in batches])
        return update(self, parts, tables, samples, timing, **options)

    def watched_train(role, *arguments, **options):
        role_at_work.append(role.name)
        seen["away"].append({name: other.engine.is_away for name, other in roles.items() if other.is_here})
        return train(role, *arguments, **options)

    def watched_step(self, batches, loss, **options):
        result = step(self, batches, loss, **options)
        seen["steps"].setdefault(role_at_work[-1], []).append({
            "metrics": result.metrics, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate,
            "answers": _numbers(batches),
        })  # fmt: skip
        return result

    Rollout.sampled, Scorer.__call__, PolicyStage._update = watched_sampled, watched_judged, watched_update
    policy_stage.train, Engine.train_step = watched_train, watched_step


def _numbers(batches) -> list[list[int]]:
    return [batch["numbers"].tolist() for batch in batches]


def _no_temperature(name: str) -> None:
    """The role's log-probabilities are at temperature 1."""
    right = policy_stage.log_probs_fn

    def wrong(role, stage):
        return partial(right(role, stage), temperature=1.0) if role.name == name else right(role, stage)

    policy_stage.log_probs_fn = wrong


def _other_tokens() -> None:
    """The reference's numbers are those of the token before."""
    right = policy_stage.fill

    def wrong(table, role, parts, fn):
        right(table, role, parts, fn)
        if role.name == "reference":
            cells = table.nonzero(as_tuple=True)
            table[cells] = table[cells].roll(1)

    policy_stage.fill = wrong


FAULTS: dict[str, Callable[[], None]] = {
    "reference without temperature": partial(_no_temperature, "reference"),
    "old policy without temperature": partial(_no_temperature, "actor"),
    "numbers of other tokens": _other_tokens,
}


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have alike, and the steps of every role, of whose ranks all have the same numbers."""
    first = ranks[0]
    steps: dict[str, list] = {}
    for rank in ranks:
        assert rank.get("problems") == [], rank
        assert rank["answers"] == first["answers"], "answers are whole on every rank"
        for name, table in rank["tables"][0].items():
            assert torch.equal(table, first["tables"][0][name]), name
        for role, found in rank["steps"].items():
            told = [{key: value for key, value in step.items() if key != "answers"} for step in found]
            assert steps.setdefault(role, told) == told, f"ranks of {role} disagree"
    return {**first, "steps": steps}


def with_dropout() -> dict[str, Any]:
    """Log-probabilities of random tokens by two engines of the same weights, one with dropout: by `forward` twice with
    and once without it, and the losses of a training step with and without."""
    found: dict[str, Any] = {}
    for name, rate in (("with", 0.5), ("without", 0.0)):
        cfg = config({"model.hidden_dropout": rate, "model.attention_dropout": rate})
        engine, loss = make_engine(cfg)
        batch = dict(micro_batches(samples(0), engine.mesh, 4)[0])
        batch["cells"] = torch.arange(batch["tokens"].numel()).view(batch["tokens"].shape)
        fn = partial(
            answer_token_log_probs, tp_group=engine.mesh.groups.tp, vocab_size=engine.vocab_size, temperature=0.7
        )  # fmt: skip
        found[name] = [engine.forward([batch], fn)[0][1] for _ in range(2)]
        found[f"loss {name}"] = engine.train_step([batch], loss, samples=4).metrics["lm loss"]
    return found
