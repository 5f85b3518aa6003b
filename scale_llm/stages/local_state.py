"""A run's state to copies on the nodes' own disks and back: checkpoint.local_interval, local_dir and local_replicas."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.checkpoint.local_copies import LocalCopies, run_identity
from scale_llm.checkpoint.local_exchange import directory_of
from scale_llm.checkpoint.whole import Found
from scale_llm.config.checkpoint_files import latest_checkpoint, saved_iterations
from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from scale_llm.engine import state as engine_state
from scale_llm.engine.offload import on_device
from scale_llm.engine.own_state import load_own, own_tensors
from scale_llm.parallel.rng import rng_state, set_rng_state
from scale_llm.stages.base import Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.progress import Progress
from scale_llm.stages.run_state import gradients, plain_progress

SHOWN = 8
"""Remarks that are printed at once: a node that was in another run has some for each of its ranks."""


class LocalState:
    """Does nothing where checkpoint.local_interval is null. Every rank makes one before a checkpoint is looked for, and
    calls all methods alike."""

    def __init__(self, run: RunContext):
        cfg, self._run = run.cfg.checkpoint, run
        self._copies: LocalCopies | None = None
        if cfg.local_interval is None or cfg.local_dir is None:
            return
        self._tracker = self._newest_checkpoint()
        world = dist.get_world_size()
        self._copies = LocalCopies(
            directory_of(Path(cfg.local_dir), Path(run.cfg.run_dir), dist.get_rank()),
            group=dist.new_group(backend="gloo"), host_group=run.mesh.host_group,
            run=run_identity(Path(cfg.save or ""), run.mesh.host_group), layout=layout_of(run.cfg, world),
            ranks_per_node=run.cfg.cluster.nproc_per_node or max(1, world // run.cfg.cluster.nnodes),
            replicas=cfg.local_replicas,
        )  # fmt: skip

    def save_if_due(self, stage: Stage, progress: Progress) -> None:
        """Begins a copy every local_interval iterations. What went wrong with one before is told, and ends nothing."""
        interval = self._run.cfg.checkpoint.local_interval
        if self._copies is None or interval is None or progress.iteration % interval:
            return
        plain: dict[str, Any] = {**plain_progress(stage, progress), "rng_state": rng_state(), "engines": {}}
        tensors: dict[str, torch.Tensor] = {}
        with on_device(stage.engines.values()):
            for name, engine in stage.engines.items():
                if engine is not None:
                    plain["engines"][name] = engine_state.plain_state(engine)
                    tensors |= {f"{name}/{key}": value for key, value in own_tensors(engine).items()}
            self._tell(self._copies.save(
                progress.iteration, tensors, plain, after=self._newest_checkpoint(), unneeded=gradients(stage)
            ))  # fmt: skip

    def finish(self) -> None:
        """Waits for the last copy."""
        if self._copies is not None:
            self._tell(self._copies.finish())

    def forget(self) -> None:
        """Removes all copies: the run goes back to before them."""
        if self._copies is not None:
            self._tell(self._copies.forget())

    def restore(self, stage: Stage, own: Found | None) -> Progress | None:
        """The newest whole copy into the stage, where it is newer than `own`; else None."""
        if self._copies is None:
            return None
        newer_than = own.iteration if own is not None else 0
        found = self._copies.find(newer_than, self._tracker, hashing=self._run.cfg.checkpoint.verify)
        self._tell(found.remarks)
        if found.iteration is None:
            return None
        problem: str | None = None
        tensors: dict[str, torch.Tensor] = {}
        plain: dict[str, Any] = {}
        try:
            tensors, plain = self._copies.load(found.iteration)
        except UserError as error:
            problem = "; ".join(error.problems)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._run.mesh.host_group)
        if any(problems):
            self._tell([problem for problem in problems if problem])
            return None
        with on_device(stage.engines.values()):
            for name, engine in stage.engines.items():
                if engine is not None:
                    mine = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
                    load_own(engine, mine, plain["engines"][name])
        stage.load_state(plain["stage"])
        set_rng_state(plain["rng_state"])
        self._tell([f"going on from the local copies of iteration {found.iteration}"])
        return Progress(**plain["progress"])

    def _newest_checkpoint(self) -> int:
        """Iteration of the checkpoint that the tracker names, on every rank; where it does not say, of the newest that
        is there; -1: there is none."""
        told = [-1]
        directory = self._run.cfg.checkpoint.save or ""
        if dist.get_rank() == 0:
            try:
                found = latest_checkpoint(directory)
            except ValueError:
                found = None
            told = [found[0] if found is not None else max(saved_iterations(directory), default=-1)]
        dist.broadcast_object_list(told, src=0, group=self._run.mesh.host_group)
        return told[0]

    def _tell(self, remarks: list[str]) -> None:
        if remarks and dist.get_rank() == dist.get_world_size() - 1:
            shown = (
                remarks if len(remarks) <= SHOWN else [*remarks[:SHOWN], f"and {len(remarks) - SHOWN} more of the kind"]
            )
            print("\n".join(f" {remark}" for remark in shown), flush=True)


def layout_of(cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """Everything that decides which rank holds which tensors."""
    parallel = {key: value for key, value in asdict(cfg.parallel).items() if key != "distributed_timeout_minutes"}
    groups = {"parallel": parallel, "model": asdict(cfg.model), "precision": asdict(cfg.precision),
              "peft": asdict(cfg.peft), "layout": asdict(cfg.layout)}  # fmt: skip
    whole = {"world_size": world_size, "stage": cfg.stage.name, "optimizer": cfg.optim.optimizer.value, **groups}
    return json.loads(json.dumps(whole, default=str))
