"""One training step of one model on one mesh: micro-batches through megatron-core's schedules, the only normalisation,
the optimizer and the learning rate.

A loss is `(model_output, batch) -> (loss_sum, count, metrics)`; the engine divides once, by the count over all
micro-batches and data- and context-parallel ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from scale_llm.config.model import Backend
from scale_llm.config.peft import LOW_RANK, BaseQuantization, PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.train import CudaGraphImpl
from scale_llm.engine.counted import COUNTED, only_counted
from scale_llm.engine.moe import Balancing, Batch, Counts, load_balancing_losses
from scale_llm.engine.offload import Offload, Offloaded
from scale_llm.engine.optimizer import build_optimizer, build_scheduler, parts
from scale_llm.engine.optimizer_kernels import name_of
from scale_llm.engine.update import Update, update
from scale_llm.models import fp8
from scale_llm.models.adapters.layers import without_adapters
from scale_llm.models.gpt import build_gpt
from scale_llm.models.layer_graphs import capturable, graph_layers
from scale_llm.models.packing import PackedSequences, packed_sequences
from scale_llm.models.spec import choose_backend
from scale_llm.models.transformer_config import transformer_config
from scale_llm.models.user_buffers import make_user_buffers
from scale_llm.parallel import collectives
from scale_llm.parallel.context import shard_sequence
from scale_llm.parallel.device import Device
from scale_llm.parallel.mesh import Mesh
from scale_llm.parallel.ranges import named, timer

Loss = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, dict]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """metrics: name -> mean over the global batch. skipped: nothing was updated, of an FP16 overflow or a number that
    is none."""

    metrics: dict[str, float]
    grad_norm: float | None
    num_zeros: float | None
    learning_rate: float
    loss_scale: float
    skipped: bool
    broken: str | None = None
    """Which loss or gradient is no number. The metrics are left out."""
    tokens: int | None = None
    """That are no padding, over all ranks; None: every place of every sample."""
    remarks: tuple[str, ...] = ()
    """Lines for the log."""
    stop: tuple[str, ...] = ()
    """Why the run is to end after this step, saved."""
    texts: dict[str, str] = field(default_factory=dict)
    """Markdown by its tag in TensorBoard."""


class Engine:
    """A model, its optimizer and its schedule on one mesh."""

    def __init__(
        self, cfg: RunConfig, mesh: Mesh, device: Device, *, vocab_size: int, trainable: bool = True,
        noise: float = 0.0,
    ):  # fmt: skip
        """vocab_size: tokens before padding. noise: NEFTune's alpha."""
        self.mesh, self.device, self.vocab_size = mesh, device, vocab_size
        self.config = transformer_config(cfg.model, cfg.parallel, cfg.precision, cfg.train, on_cuda=device.is_cuda)
        if self.config.tp_comm_overlap:
            tokens = cfg.model.seq_length * cfg.train.micro_batch_size // cfg.parallel.context_parallel_size
            make_user_buffers(self.config, tokens=tokens)
        self.modules = build_gpt(
            cfg.model, self.config, mesh, vocab_size=vocab_size, seed=cfg.train.seed, on_cuda=device.is_cuda,
            peft=cfg.peft, noise=noise,
        )  # fmt: skip
        self.peft = cfg.peft
        self.chunks: list[torch.nn.Module] = list(self.modules)
        low_rank = cfg.peft.method in LOW_RANK
        backend = choose_backend(cfg.model.backend, on_cuda=device.is_cuda, low_rank=low_rank)
        self.backend, self._fused = backend, backend is Backend.transformer_engine
        self.optimizer = self.scheduler = None
        self._clip_grad, self._count_zeros = cfg.optim.clip_grad, cfg.logging.log_num_zeros_in_grad
        self._gathers_late = trainable and cfg.parallel.overlap_param_gather
        self._rates: list[tuple[dict, float, float]] | None = None  # (where they stand, highest, lowest)
        self._counts: list[torch.Tensor] = []  # of the micro-batches of this step, on the last stage
        self._tokens = 1.0  # that counted in the last global batch
        self._spoils = False
        self._balancing = Balancing(self.config, mesh, device.device)
        self._replays = self._waits_for_graphs = trainable and cfg.train.cuda_graph_impl is CudaGraphImpl.local
        self.updates = 0  # optimizer steps that were not skipped
        if trainable:
            with capturable() if self._replays and device.is_cuda else nullcontext():
                self.chunks = self._wrap(cfg)
            self.optimizer = build_optimizer(self.chunks, mesh, cfg.optim, cfg.precision, cfg.parallel, cfg.logging)
            self.scheduler = build_scheduler(self.optimizer, cfg.optim, cfg.train)
            self._connect(cfg)
        self._schedule = get_forward_backward_func(mesh.sizes.pp, mesh.sizes.vpp)
        self._p2p = P2PCommunicator(mesh.groups.pp, self.config) if mesh.sizes.pp > 1 else None
        self._offload = Offload(self)

    def _wrap(self, cfg: RunConfig) -> list[torch.nn.Module]:
        """megatron-core's data-parallel wrapper: gradient buffers and their reduction."""
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=cfg.precision.accumulate_allreduce_grads_in_fp32,
            overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
            overlap_param_gather=cfg.parallel.overlap_param_gather,
            use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
            bucket_size=cfg.parallel.ddp_bucket_size,
            pad_buckets_for_high_nccl_busbw=cfg.parallel.ddp_pad_buckets_for_high_nccl_busbw,
        )
        return [
            DistributedDataParallel(
                config=self.config, ddp_config=ddp, module=module, disable_bucketing=i > 0,
                pg_collection=self.mesh.groups,
            )
            for i, module in enumerate(self.modules)
        ]  # fmt: skip

    def _connect(self, cfg: RunConfig) -> None:
        """Tells megatron-core's schedules which functions scale the loss and reduce gradients."""
        config, chunks = self.config, self.chunks
        config.timers = timer
        config.finalize_model_grads_func = self._finalize_gradients
        if cfg.precision.fp16:
            config.grad_scale_func = self.optimizer.scale_loss
        if cfg.parallel.overlap_grad_reduce:
            hooks = [chunk.no_sync for chunk in chunks]
            config.no_sync_func = hooks[0] if len(hooks) == 1 else hooks
        if cfg.parallel.overlap_param_gather and len(chunks) > 1:
            config.param_sync_func = [chunk.start_param_sync for chunk in chunks]

    def train_step(
        self, batches: Iterable[Batch], loss_fn: Loss, *, samples: int, counts: Counts | None = None
    ) -> StepResult:
        """Forward, backward and update. batches: this rank's micro-batches; samples: the global batch size. counts:
        what the loss counts of a micro-batch as it is given here; None: every place."""
        self.require_weights()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with named("data"):
            micro_batches = list(batches)
        if self._waits_for_graphs:  # for weights that are loaded, and for the shape
            graph_layers(self.modules[0], *micro_batches[0]["tokens"].shape)
            self._waits_for_graphs = False
        balanced = self._balancing.weigh(micro_batches, counts)
        metrics = self._run(micro_batches, loss_fn, forward_only=False)
        if balanced:
            metrics |= load_balancing_losses(
                self.mesh,
                self.device.device,
                num_layers=self.config.num_layers,
                micro_batches=len(micro_batches),
            )
        bad = {name: value for name, value in metrics.items() if name.endswith("loss") and not math.isfinite(value)}
        if bad:  # its gradient is none either, or of numbers that mean nothing
            result = Update(done=False)
        else:
            with named("optimizer"):
                result = update(
                    self.optimizer, tokens=self._tokens, clip_grad=self._clip_grad, count_zeros=self._count_zeros
                )
        if result.grad_norm is not None and not math.isfinite(result.grad_norm):
            bad["grad norm"] = result.grad_norm
        learning_rate = self.learning_rate
        if result.done:
            self.scheduler.step(increment=samples)
            self.updates += 1
        return StepResult(
            metrics={} if bad else metrics,
            grad_norm=None if bad else result.grad_norm,
            num_zeros=result.num_zeros,
            learning_rate=learning_rate,
            # Without FP16 it is a 1 on the GPU, and reading it would wait for the whole update
            loss_scale=float(self.optimizer.get_loss_scale()) if self.config.fp16 else 1.0,
            skipped=not result.done,
            broken=", ".join(f"{name} {value}" for name, value in bad.items()) or None,
        )

    def spoil_next_gradient(self) -> None:
        """A drill: the next step finds NaN in one gradient of this rank."""
        self._spoils = True

    def _finalize_gradients(self, chunks, num_tokens, pg_collection=None, force_all_reduce=False) -> None:
        """Reduces gradients over ranks as megatron-core does, and learns what the update must divide them by."""
        with named("reduction of gradients"):
            finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        # Not megatron-core's own sum, which is of whole numbers: tokens may have weights.
        count = torch.zeros((), dtype=torch.float64, device=self.device.device)
        for part in self._counts:
            count += part
        if self._p2p is not None:  # only the last stage has counted
            dist.broadcast(count, src=self.mesh.last_stage_rank, group=self.mesh.groups.pp)
        collectives.all_reduce(count, group=self.mesh.groups.dp_cp)
        self._tokens = float(count) or 1.0

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return get_canonical_lr_for_logging(self.optimizer.param_groups) or 0.0

    def scale_learning_rate(self, factor: float) -> None:
        """Steps from now on take the configured rates times this."""
        if self._rates is None:
            groups = self.optimizer.param_groups
            self._rates = [(group, group.get("max_lr"), group.get("min_lr")) for group in groups]
            self._rates.append((vars(self.scheduler), self.scheduler.max_lr, self.scheduler.min_lr))
        for rates, highest, lowest in self._rates:
            for name, value in (("max_lr", highest), ("min_lr", lowest)):
                if value is not None:
                    rates[name] = value * factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduler.get_lr(group)

    @property
    def kernels(self) -> str:
        """Whose layers, attention, weight gradients and optimizer it has, for the log."""
        attention = {
            Backend.transformer_engine: "flash, cuDNN's or Transformer Engine's own attention, as it chooses",
            Backend.torch: "torch's scaled_dot_product_attention",
            Backend.local: "megatron-core's attention",
        }
        said = [f"{self.backend.value} layers", attention[self.backend]]
        said.append(f"weight gradients {'fused' if self.config.gradient_accumulation_fusion else 'not fused'}")
        if self._replays:
            said.append("layers as CUDA graphs")
        inner = [part.optimizer for part in parts(self.optimizer)] if self.optimizer is not None else []
        said += sorted({name_of(optimizer) for optimizer in inner if optimizer is not None})
        return ", ".join(said)

    @property
    def has_adapters(self) -> bool:
        """Whether a frozen base lies under what is trained."""
        return self.peft.method is not PeftMethod.none

    def begin_adapters(self, prompt: list[int]) -> None:
        """Once the base is loaded: its weights into 4 bits if asked for, and what adapters begin with from it.

        prompt: tokens whose embeddings virtual ones begin as. A collective.
        """
        self.require_weights()
        for module in self.modules:
            module.begin_adapters(quantise=self.peft.quantize_base is BaseQuantization.nf4, prompt=prompt)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def base(self):
        """A context in which the model is what lies under its low-rank adapters."""
        return without_adapters(self.modules)

    def offload(self) -> Offloaded:
        """Weights, gradients and optimizer state out of the device's memory; see `Offload`."""
        return self._offload.offload()

    def onload(self) -> Offloaded:
        """Back, as they were."""
        return self._offload.onload()

    @property
    def is_away(self) -> bool:
        """Whether it is offloaded."""
        return self._offload.is_away

    def require_weights(self) -> None:
        """Raises RuntimeError where they are offloaded: their tensors point at no memory."""
        if self._offload.is_away:
            raise RuntimeError("the engine is offloaded: call onload first")

    def gather_parameters(self) -> None:
        """Makes every rank's weights whole: with overlap_param_gather they are so only in the next forward pass.

        Before anything but a training step reads them. A collective.
        """
        self.require_weights()
        if not self._gathers_late:
            return
        for chunk in self.chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """For passes of the modules themselves that the ranks of other replicas do not join: weights are whole, dropout
        is off, and no forward pass gathers anything over data-parallel ranks. Begins with a collective."""
        self.require_weights()
        if self._gathers_late:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            if self._gathers_late:
                for chunk in self.chunks:
                    chunk.enable_forward_pre_hook()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], loss_fn: Loss) -> dict[str, tuple[float, float]]:
        """Metric sums and counts over this rank's micro-batches and all ranks; nothing of the engine changes."""
        self.gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        with fp8.unchanged(self.modules):
            return self._run(list(batches), loss_fn, forward_only=True, mean=False)

    @torch.no_grad()
    def forward(self, batches: list[Batch], fn: Callable[[torch.Tensor, Batch], Any]) -> list[Any]:
        """What `fn(model_output, batch)` gives for each micro-batch, without gradients and dropout; [] on ranks that do
        not hold the last pipeline stage."""
        self.gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        with fp8.unchanged(self.modules):
            return self._schedule_of(batches, fn, forward_only=True, collect_non_loss_data=True)

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row must be divisible by on this layout."""
        sizes = self.mesh.sizes
        context = 2 * sizes.cp if sizes.cp > 1 else 1
        return context * self.row_multiple

    @property
    def row_multiple(self) -> int:
        """The same where context-parallel ranks all have the whole row."""
        return self.mesh.sizes.tp if self.config.sequence_parallel else 1

    def _run(self, batches: list[Batch], loss_fn: Loss, *, forward_only: bool, mean: bool = True):
        self._counts.clear()
        counted = lambda output, batch: self._count(loss_fn(output, batch))  # noqa: E731
        return self._reduce(self._schedule_of(batches, counted, forward_only=forward_only), mean)

    def _schedule_of(self, batches: list[Batch], fn, **options) -> list[Any]:
        """Every micro-batch through megatron-core's schedule of this layout."""

        def forward_step(iterator, model):
            batch = self._place(next(iterator))
            output = model(
                batch["tokens"], batch["position_ids"], batch.get("attention_mask"),
                packed_seq_params=self._packed(batch), loss_mask=batch.get(COUNTED),
            )  # fmt: skip
            if self._spoils and output.requires_grad:
                self._spoils = False
                output.register_hook(_with_nan)
            return output, lambda out, **_: fn(out, batch)

        rows, tokens = batches[0]["tokens"].shape
        assert self._p2p is None or all(batch["tokens"].shape == (rows, tokens) for batch in batches), (
            "one shape a step"
        )
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=tokens,
            micro_batch_size=rows,
            p2p_communicator=self._p2p,
            pg_collection=self.mesh.groups,
            **options,
        )

    def _place(self, batch: Batch) -> Batch:
        """The batch on this rank's device, cut to its part of the sequence, what the loss needs to the places that
        count. What has the shape of the tokens is of places; boundaries of packed sequences stay."""
        group = self.mesh.groups.cp
        shape = batch["tokens"].shape
        dims = {key: 1 for key, value in batch.items() if value.shape == shape}
        if "attention_mask" in batch:
            dims["attention_mask"] = 2
        cut = {key: shard_sequence(value, dims[key], group) if key in dims else value for key, value in batch.items()}
        if self.modules[-1].is_language_model and not self.config.sequence_parallel:
            cut = only_counted(cut)
        return {key: self._copied(value) if key in dims or key == COUNTED else value for key, value in cut.items()}

    def _copied(self, value: torch.Tensor) -> torch.Tensor:
        """On this rank's device. A copy of memory that is not pinned would wait for what the GPU has been given."""
        if self.device.is_cuda and not value.is_cuda:
            value = value.pin_memory()
        return value.to(self.device.device, non_blocking=True)

    def _packed(self, batch: Batch) -> PackedSequences | None:
        """What a row of several sequences tells attention: batches have `boundaries` int32 [n + 1], on the host."""
        if "boundaries" not in batch:
            return None
        return packed_sequences(
            batch["boundaries"], batch["position_ids"], self.mesh.groups.cp, self.device.device, fused=self._fused
        )

    def _count(self, result):
        """What megatron-core's schedules expect: the sum, an integer count, and what to report."""
        loss_sum, count, metrics = result
        self._counts.append(count.detach())
        return loss_sum, count.to(torch.int), metrics

    def _reduce(self, results: list[dict], mean: bool):
        """Sums over micro-batches, then over data- and context-parallel ranks, then tells every pipeline stage."""
        names: list[str] = sorted(results[0]) if results else []
        if self.mesh.sizes.pp > 1:
            told = [names]
            dist.broadcast_object_list(told, src=self.mesh.last_stage_rank, group=self.mesh.groups.pp)
            names = told[0]
        totals = torch.zeros(len(names), 2, dtype=torch.float32, device=self.device.device)
        for result in results:
            for i, name in enumerate(names):
                totals[i, 0] += result[name][0]
                totals[i, 1] += result[name][1]
        if self.mesh.is_last_stage:
            collectives.all_reduce(totals, group=self.mesh.groups.dp_cp)
        if self.mesh.sizes.pp > 1:
            dist.broadcast(totals, src=self.mesh.last_stage_rank, group=self.mesh.groups.pp)
        values = totals.tolist()
        if not mean:
            return {name: (values[i][0], values[i][1]) for i, name in enumerate(names)}
        return {name: values[i][0] / (values[i][1] or 1.0) for i, name in enumerate(names)}


def _with_nan(gradient: torch.Tensor) -> torch.Tensor:
    """The same but for its first element."""
    spoilt = gradient.clone()
    spoilt.view(-1)[0] = math.nan
    return spoilt
