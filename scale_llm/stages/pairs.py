"""What stages on pairs of answers share: batches of whole pairs, a step, an evaluation on pairs that are held out."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from scale_llm.config.batch import settle_epochs
from scale_llm.config.stage import SequenceStageConfig
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.chat.preferences import Preferences
from scale_llm.data.sequence_loader import Batch, SequenceLoader
from scale_llm.engine.engine import Engine, Loss, StepResult
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.interval import wilson_interval
from scale_llm.stages.sequences import Members, loader_of, stream_of

ACCURACY = "rewards/accuracies"


class PairStage:
    """A stage the loop drives, on comparisons: of a list of two or more answers the best and the worst."""

    def __init__(
        self, run: RunContext, preferences: Preferences, loss_of: Callable[[RunContext], Loss], *,
        completed: Callable[[Batch], Batch], whole: bool = False,
    ):  # fmt: skip
        """completed: adds to a batch what the loss needs by the `numbers` of its sequences. whole: a row has a place
        for the last token of a sequence too, for models that judge it."""
        cfg, stage = run.cfg, run.cfg.stage
        assert isinstance(stage, SequenceStageConfig)
        self._run, self._completed, self._whole = run, completed, whole
        self._row = 2 * cfg.model.seq_length  # a pair of the longest answers
        self._sequences, groups = preferences.sequences, np.asarray(preferences.groups)
        train, held_out = (
            Members(self._sequences, groups, split_indices(len(preferences), cfg.data.split, split), whole=whole)
            for split in ("train", "validation")
        )
        epochs = cfg.train.train_epochs or math.inf
        stream = stream_of(stage, train.places, self._row, seed=cfg.train.seed, end=epochs)
        if cfg.train.train_epochs is not None:
            settle_epochs(cfg.train, stream.samples_in(cfg.train.train_epochs))
        self.engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size)
        self._loss = loss_of(run)
        self._loader = self._loader_of(train.of(stream))
        self._held_out, self._evaluations = None, 0
        if len(held_out.places) and cfg.train.eval_iters:
            stream = stream_of(stage, held_out.places, self._row, seed=0, end=1, shuffle=False)
            self._evaluations = min(cfg.train.eval_iters, -(-stream.samples_in(1) // cfg.train.global_batch_size))
            self._held_out = self._loader_of(held_out.of(stream))

    def _loader_of(self, stream) -> SequenceLoader:
        return loader_of(
            self._run.cfg, self._run.mesh, self._sequences, stream, row_tokens=self._row, numbered=True,
            whole=self._whole,
        )  # fmt: skip

    def start(self, *, fresh: bool) -> Evaluation:
        return Evaluation()

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        batches = [self._completed(batch) for batch in self._loader.global_batch(consumed_samples, global_batch_size)]
        result = self.engine.train_step(batches, self._loss, samples=global_batch_size)
        return replace(result, tokens=self._loader.tokens_in(consumed_samples, global_batch_size))

    def evaluate(self) -> Evaluation:
        """Means over pairs; of the accuracy also the 95% interval, so that a small sample is not taken for more."""
        totals: dict[str, tuple[float, float]] = {}
        size = self._run.cfg.train.global_batch_size
        for number in range(self._evaluations):
            batches = [self._completed(batch) for batch in self._held_out.global_batch(number * size, size)]
            for name, (value, count) in self.engine.evaluate(batches, self._loss).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + count)
        found = {f"{name} validation": value / (count or 1.0) for name, (value, count) in totals.items()}
        if ACCURACY in totals:
            low, high = wilson_interval(*totals[ACCURACY])
            found |= {f"{ACCURACY} validation 95% low": low, f"{ACCURACY} validation 95% high": high}
        return Evaluation(found)

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._loader.close()
