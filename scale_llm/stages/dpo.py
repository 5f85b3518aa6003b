"""Direct preference optimisation: the policy is moved by pairs of answers, measured against where it started."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scale_llm.config.batch import settle_epochs
from scale_llm.config.stage import DpoConfig, PreferenceLoss, ReferenceModel
from scale_llm.data.chat.examples import split_indices
from scale_llm.data.chat.preferences import load_preferences
from scale_llm.data.sequence_loader import Batch
from scale_llm.engine.engine import Engine, StepResult
from scale_llm.losses.direct_preference import pair_loss
from scale_llm.losses.preference import REFERENCE_FREE
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.reference import CachedReference, LiveReference, Reference
from scale_llm.stages.sequences import Members, loader_of, stream_of


class Dpo:
    """The stage the loop drives for `stage=dpo`."""

    def __init__(self, run: RunContext):
        cfg, stage = run.cfg, run.cfg.stage
        assert isinstance(stage, DpoConfig)
        preferences = load_preferences(run.prepared)
        sequences, groups = preferences.sequences, np.asarray(preferences.groups)
        self._reference: Reference | None = None
        if stage.loss.value not in REFERENCE_FREE:
            kind = CachedReference if stage.reference is ReferenceModel.cached else LiveReference
            self._reference = kind(run, sequences, groups)
        train, held_out = (
            Members(sequences, groups, split_indices(len(preferences), cfg.data.split, split))
            for split in ("train", "validation")
        )
        epochs = cfg.train.train_epochs or math.inf
        row = pair_row(cfg.model.seq_length)
        stream = stream_of(stage, train.places, row, seed=cfg.train.seed, end=epochs)
        if cfg.train.train_epochs is not None:
            settle_epochs(cfg.train, stream.samples_in(cfg.train.train_epochs))
        self.engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size)
        self._loss = loss_of(run)
        self._loader = loader_of(cfg, run.mesh, sequences, train.of(stream), row_tokens=row, numbered=True)
        self._evaluation: list[tuple[int, int]] = []
        self._held_out = None
        if len(held_out.places) and cfg.train.eval_iters:
            stream = stream_of(stage, held_out.places, row, seed=0, end=1, shuffle=False)
            size = cfg.train.global_batch_size
            batches = min(cfg.train.eval_iters, -(-stream.samples_in(1) // size))
            self._evaluation = [(number * size, size) for number in range(batches)]
            self._held_out = loader_of(cfg, run.mesh, sequences, held_out.of(stream), row_tokens=row, numbered=True)

    def start(self, *, fresh: bool) -> Evaluation:
        return Evaluation()

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        batches = self._with_reference(self._loader.global_batch(consumed_samples, global_batch_size))
        result = self.engine.train_step(batches, self._loss, samples=global_batch_size)
        return replace(result, tokens=self._loader.tokens_in(consumed_samples, global_batch_size))

    def evaluate(self) -> Evaluation:
        totals: dict[str, tuple[float, float]] = {}
        for start, size in self._evaluation:
            batches = self._with_reference(self._held_out.global_batch(start, size))
            for name, (value, count) in self.engine.evaluate(batches, self._loss).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + count)
        return Evaluation({f"{name} validation": value / (count or 1.0) for name, (value, count) in totals.items()})

    def _with_reference(self, batches: list[Batch]) -> list[Batch]:
        if self._reference is None:
            return batches
        return [{**batch, "reference": self._reference.log_probs(batch["numbers"].numpy())} for batch in batches]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._loader.close()


def pair_row(seq_length: int) -> int:
    """Places of a packed row: a pair of the longest answers."""
    return 2 * seq_length


def loss_of(run: RunContext):
    """The configured loss as the engine calls it."""
    stage, groups = run.cfg.stage, run.mesh.groups
    assert isinstance(stage, DpoConfig)
    options = {"beta": stage.beta}
    if stage.loss in (PreferenceLoss.cdpo, PreferenceLoss.robust_dpo):
        options["label_smoothing"] = stage.label_smoothing
    if stage.loss is PreferenceLoss.simpo:
        options["margin"] = stage.simpo_gamma
    return partial(
        pair_loss, tp_group=groups.tp, cp_group=groups.cp, vocab_size=run.vocab_size, name=stage.loss.value,
        options=options, length_normalised=stage.length_normalised, sft_coeff=stage.sft_coeff,
    )  # fmt: skip
