"""What every stage on whole sequences shares: batches of units, a step, an evaluation on units that are held out.

A stage is a SequenceTask: its sequences and what belongs together among them, its loss, and what to say of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from scale_llm.config.batch import settle_epochs
from scale_llm.config.errors import UserError
from scale_llm.config.stage import Batching, SequenceStageConfig
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.sequence_loader import Batch, TokenSequences
from scale_llm.data.sequence_stream import SequenceStream
from scale_llm.data.units import Units
from scale_llm.engine.engine import Engine, Loss, StepResult
from scale_llm.engine.moe import Counts
from scale_llm.parallel.ranges import named
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.sequences import loader_of, stream_of

Totals = dict[str, tuple[float, float]]
"""Metric -> (sum, count)."""


class Answers(Protocol):
    """What the model answers to a few prompts. remarks: lines for the log, as training begins."""

    remarks: list[str]

    def before(self, engine: Engine) -> dict[str, str]: ...
    def after(self, engine: Engine) -> dict[str, str]: ...


def means(totals: Totals) -> dict[str, float]:
    """By their TensorBoard tags."""
    return {f"{name} validation": value / (count or 1.0) for name, (value, count) in totals.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceTask:
    """sequences: all of them. groups: int [u + 1], unit i has sequences groups[i] to groups[i + 1]. loss and counts: as
    the engine calls them. held_out, held_out_loss: sequences and loss of an evaluation, by default the same. complete:
    adds to the micro-batches of a step what the loss needs by the `numbers` of their sequences. summary: of a whole
    evaluation. answers: to prompts, before and after training. row_tokens: of a packed row, by default
    model.seq_length. numbered, whole, every_token: see sequence_loader.Shape. ends: see Units. noise: NEFTune's alpha.
    """

    sequences: TokenSequences
    groups: np.ndarray
    loss: Loss
    counts: Counts
    held_out: TokenSequences | None = None
    held_out_loss: Loss | None = None
    complete: Callable[[Engine, list[Batch]], list[Batch]] | None = None
    summary: Callable[[Totals], Evaluation] = lambda totals: Evaluation(means(totals))
    answers: Answers | None = None
    row_tokens: int | None = None
    numbered: bool = False
    whole: bool = False
    every_token: bool = False
    ends: bool = False
    noise: float = 0.0


def held_out_units(run: RunContext, groups: np.ndarray) -> np.ndarray:
    """The units of the validation split."""
    return split_indices(len(groups) - 1, run.cfg.data.split, "validation")


class SequenceStage:
    """A stage the loop drives."""

    def __init__(self, run: RunContext, task: SequenceTask):
        cfg, stage = run.cfg, run.cfg.stage
        assert isinstance(stage, SequenceStageConfig)
        self._run, self._task = run, task
        self._row = task.row_tokens or cfg.model.seq_length
        train = self._units(split_indices(len(task.groups) - 1, cfg.data.split, "train"))
        self._check_budget(train)
        epochs = cfg.train.train_epochs or math.inf
        stream = stream_of(stage, train, self._row, seed=cfg.train.seed, end=epochs)
        if cfg.train.train_epochs is not None:
            settle_epochs(cfg.train, stream.samples_in(cfg.train.train_epochs))
        self.engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, noise=task.noise)
        self.engines = {"": self.engine}
        self._loader = self._loader_of(task.sequences, stream)
        self._held_out, self._evaluations = None, 0
        held_out = self._units(held_out_units(run, task.groups))
        if len(held_out) and cfg.train.eval_iters:
            stream = stream_of(stage, held_out, self._row, seed=0, end=1, shuffle=False)
            self._evaluations = min(cfg.train.eval_iters, -(-stream.samples_in(1) // cfg.train.global_batch_size))
            self._held_out = self._loader_of(task.sequences if task.held_out is None else task.held_out, stream)

    def _units(self, numbers: np.ndarray) -> Units:
        task = self._task
        return Units(task.sequences.lengths, task.groups, numbers, whole=task.whole, ends=task.ends)

    def _check_budget(self, units: Units) -> None:
        """Ranked lists may be longer than pairs, which is known with the data."""
        stage = self._run.cfg.stage
        assert isinstance(stage, SequenceStageConfig)
        budget, longest = stage.max_tokens_per_micro_batch, int(units.places.max(initial=0))
        if stage.batching is Batching.token_budget and budget is not None and longest > budget:
            raise UserError(
                f"stage.max_tokens_per_micro_batch={budget}: a list of answers takes {longest} tokens; give at least "
                "as many"
            )

    def _loader_of(self, sequences: TokenSequences, stream: SequenceStream):
        task = self._task
        return loader_of(
            self._run.cfg, self._run.mesh, sequences, stream, row_tokens=self._row, numbered=task.numbered,
            whole=task.whole, every_token=task.every_token,
        )  # fmt: skip

    def _batches(self, loader, first: int, size: int) -> list[Batch]:
        with named("data"):
            batches = loader.global_batch(first, size)
        return self._task.complete(self.engine, batches) if self._task.complete is not None else batches

    def start(self, *, fresh: bool) -> Evaluation:
        answers = self._task.answers
        if answers is None or not fresh:
            return Evaluation()
        return Evaluation(texts=answers.before(self.engine), remarks=answers.remarks)

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        batches = self._batches(self._loader, consumed_samples, global_batch_size)
        result = self.engine.train_step(batches, self._task.loss, samples=global_batch_size, counts=self._task.counts)
        return replace(result, tokens=self._loader.tokens_in(consumed_samples, global_batch_size))

    def leave_out(self, global_batch_size: int) -> None:
        pass  # samples are found by how many are consumed

    def evaluate(self) -> Evaluation:
        """The same units every time; sums over all of them are divided once."""
        totals: Totals = {}
        loss, size = self._task.held_out_loss or self._task.loss, self._run.cfg.train.global_batch_size
        for number in range(self._evaluations):
            batches = self._batches(self._held_out, number * size, size)
            for name, (value, count) in self.engine.evaluate(batches, loss).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + count)
        found = self._task.summary(totals) if totals else Evaluation()
        if self._task.answers is None:
            return found
        return replace(found, texts={**found.texts, **self._task.answers.after(self.engine)})

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._loader.close()
