"""Supervised fine-tuning: the tokens of assistant turns are predicted, from the weights of a base model."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from scale_llm.config.batch import settle_epochs
from scale_llm.config.stage import SftConfig
from scale_llm.data.chat.examples import load_examples, split_indices
from scale_llm.engine.engine import Engine, StepResult
from scale_llm.losses.language_model import language_model_loss, with_token_accuracy
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.samples import Samples
from scale_llm.stages.sequences import Subset, loader_of, stream_of, virtual_tokens


class Sft:
    """The stage the loop drives for `stage=sft`."""

    def __init__(self, run: RunContext):
        cfg, mesh, stage = run.cfg, run.mesh, run.cfg.stage
        assert isinstance(stage, SftConfig)
        examples = load_examples(run.prepared)
        prefix = virtual_tokens(cfg, run.vocab_size)
        train, held_out = (
            Subset(examples, split_indices(len(examples), cfg.data.split, split), prefix)
            for split in ("train", "validation")
        )
        epochs = cfg.train.train_epochs or math.inf
        stream = stream_of(stage, train.lengths - 1, cfg.model.seq_length, seed=cfg.train.seed, end=epochs)
        if cfg.train.train_epochs is not None:
            settle_epochs(cfg.train, stream.samples_in(cfg.train.train_epochs))
        self.engine = Engine(cfg, mesh, run.device, vocab_size=run.vocab_size, noise=stage.neftune_noise_alpha)
        part = {"tp_group": mesh.groups.tp, "vocab_size": run.vocab_size}
        self._loss = partial(language_model_loss, label_smoothing=stage.label_smoothing, **part)
        self._loader = loader_of(cfg, mesh, train, stream)
        self._evaluation = HeldOut(run, held_out, partial(with_token_accuracy, **part))
        self._samples = Samples(run, held_out)

    def start(self, *, fresh: bool) -> Evaluation:
        return Evaluation(texts=self._samples.before(self.engine) if fresh else {})

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        batches = self._loader.global_batch(consumed_samples, global_batch_size)
        result = self.engine.train_step(batches, self._loss, samples=global_batch_size)
        return replace(result, tokens=self._loader.tokens_in(consumed_samples, global_batch_size))

    def evaluate(self) -> Evaluation:
        return Evaluation(self._evaluation.run(self.engine), self._samples.after(self.engine))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._loader.close()


class HeldOut:
    """Loss and token accuracy on conversations that are not trained on; the same ones every time."""

    def __init__(self, run: RunContext, sequences: Subset, loss):
        cfg, stage = run.cfg, run.cfg.stage
        assert isinstance(stage, SftConfig)
        self._loss, self._size, self._loader = loss, cfg.train.global_batch_size, None
        self._batches = 0
        if not len(sequences) or not cfg.train.eval_iters:
            return
        lengths = np.asarray(sequences.lengths)
        stream = stream_of(stage, lengths - 1, cfg.model.seq_length, seed=0, end=1, shuffle=False)
        self._batches = min(cfg.train.eval_iters, -(-stream.samples_in(1) // self._size))
        self._loader = loader_of(cfg, run.mesh, sequences, stream)

    def run(self, engine: Engine) -> dict[str, float]:
        """Means over the tokens that count, by their TensorBoard tags."""
        totals: dict[str, tuple[float, float]] = {}
        for number in range(self._batches):
            batches = self._loader.global_batch(number * self._size, self._size)
            for name, (value, count) in engine.evaluate(batches, self._loss).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + count)
        means = {name: value / (count or 1.0) for name, (value, count) in totals.items()}
        found = {f"{name} validation": mean for name, mean in means.items()}
        if "lm loss" in means:
            found["lm loss validation ppl"] = math.exp(min(means["lm loss"], 20.0))
        return found
