"""What every stage of a run starts from: the configuration, this rank's device and mesh, the prepared data."""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from scale_llm.config.cluster import Device as DeviceKind
from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig, PretrainConfig
from scale_llm.data.of_stage import prepare_run
from scale_llm.parallel.device import Device, seed_everything, start
from scale_llm.parallel.mesh import Mesh, MeshSizes, build_mesh
from scale_llm.stages.health.watchdog import NoWatchdog
from scale_llm.stages.profile import NoProfile, profile_of


@dataclass(frozen=True, slots=True)
class RunContext:
    cfg: RunConfig
    device: Device
    mesh: Mesh
    prepared: Any
    """PreparedData, or PreparedChat of a stage of conversations."""
    watchdog: NoWatchdog = field(default_factory=NoWatchdog)
    profile: NoProfile = field(default_factory=NoProfile)

    @property
    def vocab_size(self) -> int:
        """Tokens of the model before padding."""
        return self.cfg.model.vocab_size or self.prepared.vocab_size


def mesh_sizes(parallel: ParallelConfig, world_size: int) -> MeshSizes:
    """Sizes of a layout on `world_size` ranks; data parallelism takes what is left."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    return MeshSizes(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=world_size // (tp * pp * cp),
        vpp=parallel.virtual_pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
    )


def start_rank(cfg: RunConfig, prepared: Any = None, watchdog: NoWatchdog | None = None) -> RunContext:
    """Joins the job: device, mesh, seeds, data. prepared: in place of the stage's data. watchdog: None for none."""
    kind = "cuda" if cfg.cluster.device is DeviceKind.cuda else "cpu"
    device = start(
        kind,
        cfg.parallel.distributed_timeout_minutes,
        cfg.cluster.omp_num_threads,
        compile_ops=bool(cfg.model.compile_ops),
        any_size=not isinstance(cfg.stage, PretrainConfig | EvaluateConfig),
        backend=cfg.model.backend,
        fp8_recipe=cfg.precision.fp8_recipe if cfg.precision.fp8 is not None else None,
    )
    world = dist.get_world_size()
    # Roles have meshes of their own, so that of the job is for what all ranks tell each other
    sizes = MeshSizes(dp=world) if isinstance(cfg.stage, PolicyStageConfig) else mesh_sizes(cfg.parallel, world)
    mesh = build_mesh(sizes, device.backend, timeout_minutes=cfg.parallel.distributed_timeout_minutes)
    assert mesh is not None, "the mesh covers the whole job"
    seed_everything(
        cfg.train.seed, tp_rank=mesh.tp_rank, pp_rank=mesh.pp_rank, ep_rank=mesh.ep_rank, etp_rank=mesh.etp_rank
    )
    prepared = prepared or prepare_run(cfg)  # made by the launcher, found here
    watchdog = watchdog or NoWatchdog()
    return RunContext(cfg, device, mesh, prepared, watchdog, profile_of(cfg, device, mesh.host_group, watchdog))
