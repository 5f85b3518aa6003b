"""Loss and perplexity on one split; the same samples every time."""

import math

from scale_llm.data.datasets import build_dataset
from scale_llm.data.loader import Loader
from scale_llm.data.prepare import check_splits
from scale_llm.engine.engine import Engine, Loss
from scale_llm.stages.context import RunContext


class LanguageModelEvaluation:
    """Evaluates `train.eval_iters` global batches, or as many whole ones as the split holds."""

    def __init__(self, run: RunContext, split: str, loss: Loss):
        cfg, mesh = run.cfg, run.mesh
        self.split, self._loss = split, loss
        self._batch_size = cfg.train.global_batch_size
        self._loader = None
        self._batches = 0
        if cfg.train.eval_iters == 0 or check_splits(
            run.prepared, cfg.data, seq_length=cfg.model.seq_length, splits=(split,)
        ):
            return
        dataset = build_dataset(
            run.prepared,
            cfg.data,
            split=split,
            seq_length=cfg.model.seq_length,
            seed=cfg.train.seed,
            cache_dir=cfg.data.cache_dir,
        )
        stride = cfg.train.micro_batch_size * mesh.sizes.dp
        if mesh.sizes.vpp is not None:  # the interleaved schedule takes micro-batches by the stage
            stride *= mesh.sizes.pp
        if len(dataset) < self._batch_size:
            self._batch_size = len(dataset) // stride * stride
        if self._batch_size == 0:
            return
        self._batches = min(cfg.train.eval_iters, len(dataset) // self._batch_size)
        self._loader = Loader(
            dataset,
            micro_batch_size=cfg.train.micro_batch_size,
            data_parallel_rank=mesh.dp_rank,
            data_parallel_size=mesh.sizes.dp,
        )

    def totals(self, engine: Engine) -> tuple[float, float]:
        """(summed loss, tokens)."""
        loss = tokens = 0.0
        for i in range(self._batches):
            batches = self._loader.global_batch(i * self._batch_size, self._batch_size)
            batch_loss, batch_tokens = engine.evaluate(batches, self._loss)["lm loss"]
            loss, tokens = loss + batch_loss, tokens + batch_tokens
        return loss, tokens

    def run(self, engine: Engine) -> dict[str, float]:
        """Loss per token and perplexity, by their TensorBoard tags."""
        if self._loader is None:
            return {}
        loss, tokens = self.totals(engine)
        mean = loss / max(tokens, 1.0)
        return {f"lm loss {self.split}": mean, f"lm loss {self.split} ppl": math.exp(min(mean, 20.0))}
