"""Where a run begins and when it saves: checkpoints and local copies at their intervals, and the last state."""

from pathlib import Path

import torch.distributed as dist

from scale_llm.checkpoint.checkpointer import Checkpointer
from scale_llm.checkpoint.retention import Retention, clear_remains
from scale_llm.checkpoint.whole import Found, newest_whole
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.engine.offload import on_device
from scale_llm.parallel.first import on_first
from scale_llm.parallel.ranges import named
from scale_llm.stages.base import Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.health.health import Health
from scale_llm.stages.local_state import LocalState
from scale_llm.stages.progress import Progress
from scale_llm.stages.report import Reporter
from scale_llm.stages.run_state import gradients, load_weights, restore, state_to_save, write_files


class Saving:
    """Of one run; every rank makes one and calls it alike.

    A checkpoint that falls due while weights may be bad is saved at the first step where they are not.
    """

    def __init__(self, run: RunContext, stage: Stage, health: Health):
        cfg = run.cfg.checkpoint
        self._run, self._stage, self._health = run, stage, health
        on_first(run.mesh.host_group, lambda: clear_remains(Path(cfg.save or "")))
        self._checkpointer = Checkpointer(
            cfg.save, run.mesh.host_group, asynchronous=cfg.async_save, retention=retention(run.cfg)
        )
        self._copies = LocalState(run)
        self._saved, self._due = 0, False

    def resume(self) -> Progress:
        """Fills the stage from the newest state that is whole."""
        progress, own, from_copies = resume(self._run, self._stage, self._copies)
        self._saved = own.iteration if own is not None else 0
        interval = self._run.cfg.checkpoint.save_interval
        # The checkpoint between own and local copies was not finished, or not whole
        self._due = from_copies and interval is not None and progress.iteration // interval > self._saved // interval
        return progress

    def after_step(self, progress: Progress) -> None:
        """Looks after a background save, and begins a local copy where one is due."""
        self._checkpointer.poll()
        if self._health.may_save(progress):
            self._copies.save_if_due(self._stage, progress)

    def if_due(self, progress: Progress, reporter: Reporter) -> None:
        """Saves a checkpoint every checkpoint.save_interval iterations."""
        interval = self._run.cfg.checkpoint.save_interval
        self._due = self._due or (interval is not None and progress.iteration % interval == 0)
        if self._due and self._health.may_save(progress):
            self._run.watchdog.enter("a save", progress.iteration)
            self._health.check_replicas(progress)
            self._save(progress, reporter)
            self._health.saved()
            self._saved, self._due = progress.iteration, False

    def last(self, progress: Progress, reporter: Reporter, *, done: bool) -> None:
        """The state that the run ends with, where it is not saved yet; all saves are done then.

        done: no start goes on from here, so that local copies are needed no more.
        """
        self._run.watchdog.enter("the last save", progress.iteration)
        if self._saved != progress.iteration:
            self._health.check_replicas(progress)
            self._save(progress, reporter)
        self._checkpointer.finish()
        if done:
            self._copies.forget()
        else:
            self._copies.finish()

    def at_once(self, progress: Progress, reporter: Reporter) -> None:
        """Whatever is due: the run is about to end with an error that a person has to look at."""
        self._save(progress, reporter)
        self._checkpointer.finish()

    def go_back(self) -> None:
        """What is being saved is finished, and no local copy is newer than what the run goes back to."""
        self._checkpointer.finish()
        self._copies.forget()

    def _save(self, progress: Progress, reporter: Reporter) -> None:
        run, stage = self._run, self._stage
        where = Path(run.cfg.checkpoint.save or "")
        with named("save"), reporter.saving(progress, where), on_device(stage.engines.values()):
            state = state_to_save(stage, progress, run.mesh.host_group)
            self._checkpointer.save(progress.iteration, state, write_files(run), gradients(stage))


def resume(run: RunContext, stage: Stage, copies: LocalState) -> tuple[Progress, Found | None, bool]:
    """From the run's own newest whole checkpoint or newer local copies, else from checkpoint.load, else from the start.
    What lies under adapters is in checkpoint.load in every case. Also returns that checkpoint, and whether the state is
    of local copies."""
    cfg = run.cfg
    own = newest_whole(cfg.checkpoint.save, run.mesh.host_group, hashing=cfg.checkpoint.verify)
    if own is not None and own.remarks and dist.get_rank() == dist.get_world_size() - 1:
        passed_over = "\n".join(f" {remark}" for remark in own.remarks)
        print(f"{passed_over}\n going on from {own.path}, the newest whole checkpoint", flush=True)
    adapters, base = cfg.peft.method is not PeftMethod.none, None
    if cfg.checkpoint.load is not None and (own is None or adapters):
        base = latest_checkpoint(cfg.checkpoint.load)
        if base is None:
            raise UserError(f"checkpoint.load={cfg.checkpoint.load}: no checkpoint there; name a directory that holds "
                            "latest_checkpointed_iteration.txt")  # fmt: skip
    if base is not None and (adapters or cfg.checkpoint.finetune):
        with on_device([stage.engine]):  # a run that goes back may find it in host memory
            load_weights(run, stage.engine, base[1])
        base = None
    local = copies.restore(stage, own)
    if local is not None:
        return local, own, True
    if own is not None:
        return restore(run, stage, own.path, own=True), own, False
    return Progress() if base is None else restore(run, stage, base[1], own=False), None, False


def retention(cfg: RunConfig) -> Retention:
    """Which checkpoints stay; those that this run reads do."""
    keep = cfg.checkpoint
    if keep.keep_last is None:
        return Retention()
    loads = (keep.load, cfg.reward.load, *(getattr(cfg.stage, key, None) for key in ("reference_load", "critic_load")))
    found = [latest_checkpoint(load) for load in loads if load is not None]
    return Retention(keep.keep_last, keep.keep_every, frozenset(one[1].resolve() for one in found if one is not None))
