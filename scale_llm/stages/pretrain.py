"""Next-token prediction on documents."""

from functools import partial
from typing import Any

from scale_llm.config.batch import total_samples
from scale_llm.data.datasets import build_dataset
from scale_llm.data.loader_choice import build_loader
from scale_llm.engine.engine import Engine, StepResult
from scale_llm.losses.language_model import counted_tokens, language_model_loss
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.evaluation import LanguageModelEvaluation


class Pretrain:
    """The stage the loop drives for `stage=pretrain`."""

    def __init__(self, run: RunContext):
        cfg, mesh = run.cfg, run.mesh
        self.engine = Engine(cfg, mesh, run.device, vocab_size=run.vocab_size)
        self.engines = {"": self.engine}
        self._loss = partial(language_model_loss, tp_group=mesh.groups.tp, vocab_size=run.vocab_size)
        dataset = build_dataset(
            run.prepared,
            cfg.data,
            split="train",
            seq_length=cfg.model.seq_length,
            seed=cfg.train.seed,
            num_samples=total_samples(cfg.train),
            cache_dir=cfg.data.cache_dir,
        )
        self._loader = build_loader(
            cfg.data.loader,
            dataset,
            micro_batch_size=cfg.train.micro_batch_size,
            data_parallel_rank=mesh.dp_rank,
            data_parallel_size=mesh.sizes.dp,
            num_workers=cfg.data.num_workers,
            device=run.device.device,
        )
        self._evaluation = LanguageModelEvaluation(run, "validation", self._loss)

    def start(self, *, fresh: bool) -> Evaluation:
        return Evaluation()

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        batches = self._loader.global_batch(consumed_samples, global_batch_size)
        return self.engine.train_step(batches, self._loss, samples=global_batch_size, counts=counted_tokens)

    def leave_out(self, global_batch_size: int) -> None:
        pass  # samples are found by how many are consumed

    def evaluate(self) -> Evaluation:
        return Evaluation(self._evaluation.run(self.engine))

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._loader.close()
