"""The models of a run, each on its own mesh."""

from dataclasses import dataclass, replace
from pathlib import Path

from scale_llm.checkpoint.written import written_config
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.roles import TRAINED_ROLES, layout_of, load_of, ranks_of, role_config, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.engine.engine import Engine
from scale_llm.engine.movement import Movement
from scale_llm.engine.offload import on_device
from scale_llm.parallel.mesh import Mesh, MeshSizes, build_mesh
from scale_llm.stages.context import RunContext, mesh_sizes
from scale_llm.stages.run_state import load_weights


@dataclass(frozen=True, slots=True)
class Role:
    """ranks: of the whole job. run and engine: None on ranks that hold no part of the model."""

    name: str
    cfg: RunConfig
    ranks: tuple[int, ...]
    run: RunContext | None
    engine: Engine | None
    offloads: bool

    @property
    def is_here(self) -> bool:
        return self.engine is not None

    def at_work(self):
        """A context in which the model is on the device, and after which it is in host memory where it was before."""
        return on_device([self.engine])

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the others what the role has found: one of each replica and context-parallel part, on
        the last pipeline stage."""
        return self.run is not None and self.run.mesh.tp_rank == 0 and self.run.mesh.is_last_stage


class Meshes:
    """Meshes of the job by their shape, each made once."""

    def __init__(self, backend: str, timeout_minutes: float):
        self._backend, self._timeout_minutes = backend, timeout_minutes
        self._made: dict[tuple[MeshSizes, tuple[int, ...]], Mesh | None] = {}

    def __call__(self, sizes: MeshSizes, ranks: tuple[int, ...]) -> Mesh | None:
        """A collective of the whole job. None on ranks outside."""
        key = (sizes, ranks)
        if key not in self._made:
            self._made[key] = build_mesh(sizes, self._backend, ranks, self._timeout_minutes)
        return self._made[key]


def build_roles(run: RunContext) -> dict[str, Role]:
    """Every role of the run; critic, reference and reward model with their weights, the actor as it is drawn.

    A collective of the whole job.
    """
    meshes, found = Meshes(run.device.backend, run.cfg.parallel.distributed_timeout_minutes), {}
    for name in roles_of(run.cfg):
        found[name] = _build(run, name, meshes)
        if name not in ("actor", "rollout"):
            load_weights(replace(run, cfg=found[name].cfg), found[name].engine, _path(run.cfg, name))
            if found[name].is_here and found[name].offloads:
                found[name].engine.offload()
    return found


def movement_to_rollout(run: RunContext, roles: dict[str, Role]) -> Movement:
    """Of the actor's weights to the rollout's model, which has them then. A collective of the whole job."""
    layout, engines = run.cfg.layout, (roles["actor"].engine, roles["rollout"].engine)
    with on_device(engines):  # a run that goes back finds them in host memory
        movement = Movement(
            *engines, run.mesh.world_group, run.mesh.host_group, bucket_bytes=int(layout.bucket_megabytes * 2**20),
            checksum=layout.checksum, ranks_per_node=run.cfg.cluster.nproc_per_node,
        )  # fmt: skip
        movement.run()
    return movement


def _build(run: RunContext, name: str, meshes: Meshes) -> Role:
    model = written_config(load_of(run.cfg, name)).model if name in ("critic", "reward") else None
    cfg, ranks = role_config(run.cfg, name, model), ranks_of(run.cfg, name)
    mesh = meshes(mesh_sizes(cfg.parallel, len(ranks)), ranks)
    part = engine = None
    if mesh is not None:
        part = RunContext(cfg, run.device, mesh, run.prepared)
        engine = Engine(cfg, mesh, run.device, vocab_size=part.vocab_size, trainable=name in TRAINED_ROLES)
        assert name != "reward" or not engine.modules[-1].is_language_model, "validated: it gives a number"
    return Role(name, cfg, ranks, part, engine, layout_of(run.cfg, name).offload)


def _path(cfg: RunConfig, role: str) -> Path:
    found = latest_checkpoint(load_of(cfg, role) or "")
    assert found is not None, "validated"
    return found[1]
