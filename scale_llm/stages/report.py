"""What a run says: Megatron's log line, TensorBoard, metrics.jsonl and the live bar. The last rank writes."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config import timeline
from scale_llm.config.parameters import flops_per_token
from scale_llm.engine.engine import Engine, StepResult
from scale_llm.engine.norms import parameter_norm
from scale_llm.engine.offload import on_device
from scale_llm.models.transformer_config import model_dtype
from scale_llm.parallel.device import matmul_rate
from scale_llm.stages.bar import ProgressBar
from scale_llm.stages.base import Evaluation
from scale_llm.stages.context import RunContext
from scale_llm.stages.progress import Progress

REWARD = "critic/score/mean"
"""What a policy's answers are worth, in verl's words."""

SAID = (
    REWARD, "actor/pg_loss", "critic/vf_loss", "actor/entropy", "actor/reference_kl", "response_length/mean",
    "response_length/clip_ratio", "timing_s/gen", "timing_s/update_actor",
)  # fmt: skip
"""Metrics of a policy on the terminal: metrics.jsonl has some fifty."""

TIMES = ("iteration-time", "throughput", "tokens-per-second")
"""Keys of metrics.jsonl that no two runs share."""


class Reporter:
    """Collects what happens between two log points and writes it; on all ranks but the last it only keeps time."""

    def __init__(
        self, run: RunContext, engine: Engine | None, progress: Progress, iterations: int, said: str | None = None
    ):  # fmt: skip
        """said: the first line of the log."""
        cfg = run.cfg
        self._engine = engine
        self._run, self._iterations, self._interval = run, iterations, cfg.train.log_interval
        self._writes = dist.get_rank() == dist.get_world_size() - 1
        self._flops = flops_per_token(cfg.model, cfg.parallel.tensor_model_parallel_size)
        self._steps, self._seconds, self._tokens, self._started = 0, 0.0, 0, 0.0
        self._metrics = self._tensorboard = self._bar = None
        self._peak: float | None = None  # FLOP/s, measured when first shown
        if not self._writes:
            return
        directory = Path(cfg.run_dir)
        self._metrics = open_rows(directory / "metrics.jsonl", progress.iteration)
        if cfg.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=progress.iteration + 1)
        self._bar = ProgressBar(cfg.stage.name, iterations, progress.iteration, cfg.logging.progress)
        self.say([said] if said else [])
        if engine is not None and run.device.is_cuda:
            self._say(f"kernels: {engine.kernels}")
        self._add_timeline(progress.iteration)
        if progress.iteration:
            self._say(f"resumed at iteration {progress.iteration}, {progress.consumed_samples} samples consumed")

    def step_started(self) -> None:
        self._started = time.perf_counter()

    def step_ended(self, progress: Progress, result: StepResult, samples: int) -> None:
        """Adds one step; writes where the interval ends."""
        self._seconds += time.perf_counter() - self._started
        self._steps += 1
        everywhere = samples * self._run.cfg.model.seq_length
        self._tokens += everywhere if result.tokens is None else result.tokens
        progress.add_metrics(result.metrics)
        self.say(result.remarks)
        if progress.iteration % self._interval and progress.iteration not in (1, self._iterations):
            if self._bar is not None:
                self._bar.advance(progress.iteration)
            return
        self._log(progress, progress.take_means(), result, samples)
        self._steps, self._seconds, self._tokens = 0, 0.0, 0

    def say(self, remarks: Iterable[str]) -> None:
        """Lines of the log."""
        for remark in remarks if self._writes else ():
            self._say(f" {remark}")

    def left_out(self, progress: Progress) -> None:
        """An iteration whose samples were counted and nothing else."""
        self.say([f"iteration {progress.iteration}: its samples are left out"])
        if self._bar is not None:
            self._bar.advance(progress.iteration)

    def _add_timeline(self, iteration: int) -> None:
        """What has happened to the run, as a table in TensorBoard."""
        events = timeline.read(self._run.cfg.run_dir) if self._tensorboard is not None else []
        if events:
            rows = [f"| {event.get('time', '')} | {event['event']} | {timeline.in_words(event)} |" for event in events]
            table = "\n".join(["| time | event | |", "|---|---|---|", *rows])
            self._add_texts({"timeline": table}, iteration)

    def _log(self, progress: Progress, means: dict[str, float], result: StepResult, samples: int) -> None:
        logging = self._run.cfg.logging
        norm = self._parameter_norm() if logging.log_params_norm else None
        if not self._writes:
            return
        seconds = self._seconds / self._steps
        rate = self._tokens / self._seconds
        # Of a policy's iteration the operations are not known: how often a token is read depends on the stage
        tflops = None if REWARD in means else rate * self._flops / dist.get_world_size() / 1e12
        row: dict[str, Any] = {
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            **means,
            "learning-rate": result.learning_rate,
            "batch-size": samples,
            "loss-scale": result.loss_scale,
            "grad-norm": result.grad_norm,
            "num-zeros": result.num_zeros if logging.log_num_zeros_in_grad else None,
            "params-norm": norm,
            "skipped-iterations": progress.skipped_iterations,
            "nan-iterations": progress.nan_iterations,
            "iteration-time": seconds,
            "throughput": tflops,
            "tokens-per-second": rate,
        }
        self._write({key: value for key, value in row.items() if value is not None}, set(means))
        said = {name: means[name] for name in SAID if name in means} if REWARD in means else means
        self._say(log_line(row, said, self._iterations))
        self._add_texts(result.texts, progress.iteration)
        if self._bar is not None:
            self._bar.advance(progress.iteration, self._status(means, rate, tflops))

    def _parameter_norm(self) -> float:
        """On every rank of the job, also where no part of the model is."""
        found = torch.zeros(1, dtype=torch.float64)
        if self._engine is not None:
            with on_device([self._engine]):
                found[0] = parameter_norm(self._engine)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._run.mesh.host_group)
        return float(found)

    def _status(self, means: dict[str, float], rate: float, tflops: float | None) -> str:
        """What the bar says: loss and speed, and the share of a rank's matrix-product rate, measured here once; of a
        policy, whose operations are not counted, its reward and speed."""
        if not self._bar.live:
            return ""
        if tflops is None:
            return f"reward {means[REWARD]:.3f}  {rate:,.0f} tokens/s"
        if self._peak is None:
            self._peak = matmul_rate(self._run.device, model_dtype(self._run.cfg.precision))
        loss = next((value for name, value in means.items() if name.endswith("loss")), None)
        shown = f"loss {loss:.3f}  " if loss is not None else ""
        return f"{shown}{rate:,.0f} tokens/s  MFU {tflops * 1e12 / self._peak:.0%}"

    def evaluation(self, progress: Progress, found: Evaluation) -> None:
        """Writes the result of an evaluation."""
        self._add_texts(found.texts, progress.iteration)
        metrics = found.metrics
        if metrics and self._writes:
            self._write(
                {"iteration": progress.iteration, "consumed_samples": progress.consumed_samples, **metrics},
                set(metrics),
            )
            values = " | ".join(f"{name}: {value:.6E}" for name, value in metrics.items())
            self._say(f" validation at iteration {progress.iteration} | {values} |")
        self.say(found.remarks)

    def _add_texts(self, texts: dict[str, str], iteration: int) -> None:
        for tag, text in texts.items() if self._tensorboard is not None else ():
            self._tensorboard.add_text(tag, text, iteration)

    @contextlib.contextmanager
    def saving(self, progress: Progress, directory: Path) -> Iterator[None]:
        """Says where a checkpoint goes and how long the run waited for it."""
        began = time.perf_counter()
        yield
        if self._writes:
            seconds = time.perf_counter() - began
            self._say(f" saved checkpoint at iteration {progress.iteration} to {directory} in {seconds:.2f} s")

    def close(self, progress: Progress, reason: str | None) -> None:
        if not self._writes:
            return
        self._add_timeline(progress.iteration)
        self._bar.close()
        if reason is not None:
            hint = "" if reason.startswith("signal") else "; run the same command again to go on"
            self._say(f"stopped at iteration {progress.iteration}: {reason}{hint}")
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, row: dict[str, Any], twins: set[str]) -> None:
        """One row of metrics.jsonl, and its numbers in TensorBoard; `twins` also against samples."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._tensorboard is None:
            return
        for name, value in row.items():
            if name in ("iteration", "consumed_samples"):
                continue
            self._tensorboard.add_scalar(name, value, row["iteration"])
            if name in twins:
                self._tensorboard.add_scalar(f"{name} vs samples", value, row["consumed_samples"])

    def _say(self, text: str) -> None:
        self._bar.say(text)


def open_rows(path: Path, iteration: int):
    """Opens a file of JSON rows for appending; those after `iteration`, of a lost part of the run, are dropped."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").split("\n") if _is_before(line, iteration)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")


def _is_before(line: str, iteration: int) -> bool:
    try:
        return json.loads(line)["iteration"] <= iteration
    except (ValueError, KeyError):  # a row that was cut when the process died
        return False


def log_line(row: dict[str, Any], means: dict[str, float], iterations: int) -> str:
    """Megatron's log line; where operations are not known, with tokens per second in place of them."""
    speed = f"tokens per second: {row['tokens-per-second']:,.0f}"
    if row["throughput"] is not None:
        speed = f"throughput per GPU (TFLOP/s/GPU): {row['throughput']:.3f}"
    parts = [
        f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {row['iteration']:8d}/{iterations:8d}",
        f"consumed samples: {row['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {row['iteration-time'] * 1000:.1f}",
        speed,
        f"learning rate: {row['learning-rate']:.6E}",
        f"global batch size: {row['batch-size']:5d}",
        *[f"{name}: {value:.6E}" for name, value in means.items()],
        f"loss scale: {row['loss-scale']:.1f}",
    ]
    if row["grad-norm"] is not None:
        parts.append(f"grad norm: {row['grad-norm']:.3f}")
    if row["num-zeros"] is not None:
        parts.append(f"num zeros: {row['num-zeros']:.0f}")
    if row["params-norm"] is not None:
        parts.append(f"params norm: {row['params-norm']:.3f}")
    parts.append(f"number of skipped iterations: {row['skipped-iterations']:3d}")
    parts.append(f"number of nan iterations: {row['nan-iterations']:3d} |")
    return " | ".join(parts)
