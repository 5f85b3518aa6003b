"""The one training loop: resume, step, log, evaluate, save, stop."""

from pathlib import Path

import torch.distributed as dist

from scale_llm.checkpoint.checkpointer import Checkpointer
from scale_llm.checkpoint.retention import Retention
from scale_llm.checkpoint.whole import newest_whole
from scale_llm.config.batch import global_batch_size, total_iterations, total_samples
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.engine.offload import on_device
from scale_llm.stages.base import Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.health.health import Health
from scale_llm.stages.health.steps import GoBack
from scale_llm.stages.local_state import LocalState
from scale_llm.stages.progress import Progress, StopRequest
from scale_llm.stages.report import Reporter
from scale_llm.stages.run_state import gradients, load_weights, restore, state_to_save, write_files


def train(run: RunContext, stage: Stage) -> None:
    """Trains until the configuration's end, a stop request, or an error; the last state is saved. Where its health asks
    for it, the run goes back to an older checkpoint and on from there."""
    cfg = run.cfg
    checkpointer = Checkpointer(
        cfg.checkpoint.save, run.mesh.host_group, asynchronous=cfg.checkpoint.async_save, retention=retention(cfg)
    )
    copies = LocalState(run)
    stop = StopRequest(run.mesh.host_group, cfg.train.exit_duration_in_mins)
    health, said = Health(run, stage), None
    run.watchdog.start()
    try:
        while True:
            try:
                return train_on(run, stage, checkpointer, copies, stop, health, said)
            except GoBack as back:
                run.watchdog.enter("going back", back.until)
                checkpointer.finish()
                copies.forget()
                said = health.go_back(back)
    finally:
        run.watchdog.close()
        stage.close()


def train_on(
    run: RunContext, stage: Stage, checkpointer: Checkpointer, copies: LocalState, stop: StopRequest, health: Health,
    said: str | None,
) -> None:  # fmt: skip
    """From the newest checkpoint to the end. said: why the run has gone back to it.

    Raises:
        GoBack: it has to be an older one.
    """
    cfg, watchdog = run.cfg, run.watchdog
    progress = resume(run, stage, copies)
    health.resumed(progress)
    reporter = Reporter(run, stage.engine, progress, total_iterations(cfg.train), said)
    saved = evaluated = progress.iteration
    reason, due = None, False
    try:
        watchdog.enter("evaluation", progress.iteration)
        reporter.evaluation(progress, stage.start(fresh=progress.iteration == 0))
        while reason is None and not finished(cfg, progress):
            size = global_batch_size(cfg.train, progress.consumed_samples)
            if health.leaves_out(progress.iteration + 1):
                count(progress, size)
                reporter.left_out(progress)
            else:
                watchdog.enter("a step", progress.iteration)
                reporter.step_started()
                result = health.step(progress, size)
                count(progress, size, skipped=result.skipped)
                result, back = health.judged(progress, result)
                reporter.step_ended(progress, result, size)
                if back is not None:
                    raise back
                if result.stop:
                    save(checkpointer, stage, progress, run, reporter)
                    checkpointer.finish()
                    raise UserError(list(result.stop))
            if every(cfg.train.eval_interval, progress.iteration):
                watchdog.enter("evaluation", progress.iteration)
                reporter.evaluation(progress, stage.evaluate())
                evaluated = progress.iteration
            watchdog.enter("the end of a step", progress.iteration)
            checkpointer.poll()
            if health.may_save(progress):
                copies.save_if_due(stage, progress)
            reason = exit_reason(cfg, progress, stop)
            reporter.say(health.check_ranks(progress))
            due = due or every(cfg.checkpoint.save_interval, progress.iteration)
            if due and health.may_save(progress):
                watchdog.enter("a save", progress.iteration)
                health.check_replicas(progress)
                save(checkpointer, stage, progress, run, reporter)
                health.saved()
                saved, due = progress.iteration, False
        watchdog.enter("the last save", progress.iteration)
        if saved != progress.iteration:
            health.check_replicas(progress)
            save(checkpointer, stage, progress, run, reporter)
        checkpointer.finish()
        copies.finish()
        if finished(cfg, progress) and evaluated != progress.iteration:
            watchdog.enter("evaluation", progress.iteration)
            reporter.evaluation(progress, stage.evaluate())
    finally:
        reporter.close(progress, reason)


def resume(run: RunContext, stage: Stage, copies: LocalState) -> Progress:
    """From the run's own newest whole checkpoint or newer local copies, else from checkpoint.load, else from the start.
    What lies under adapters is in checkpoint.load in every case."""
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
        load_weights(run, stage.engine, base[1])
        base = None
    local = copies.restore(stage, own)
    if local is not None:
        return local
    if own is not None:
        return restore(run, stage, own.path, own=True)
    return Progress() if base is None else restore(run, stage, base[1], own=False)


def retention(cfg: RunConfig) -> Retention:
    """Which checkpoints stay; those that this run reads do."""
    keep = cfg.checkpoint
    if keep.keep_last is None:
        return Retention()
    loads = (keep.load, cfg.reward.load, *(getattr(cfg.stage, key, None) for key in ("reference_load", "critic_load")))
    found = [latest_checkpoint(load) for load in loads if load is not None]
    return Retention(keep.keep_last, keep.keep_every, frozenset(one[1].resolve() for one in found if one is not None))


def finished(cfg: RunConfig, progress: Progress) -> bool:
    """Whether the configured number of iterations, or of whole batches of samples, is done."""
    if cfg.train.train_iters is not None:
        return progress.iteration >= cfg.train.train_iters
    size = global_batch_size(cfg.train, progress.consumed_samples)
    return progress.consumed_samples + size > total_samples(cfg.train)


def count(progress: Progress, size: int, *, skipped: bool = False) -> None:
    """Adds one step to the progress."""
    progress.iteration += 1
    progress.consumed_samples += size
    progress.skipped_iterations += int(skipped)


def every(interval: int | None, iteration: int) -> bool:
    return interval is not None and iteration % interval == 0


def exit_reason(cfg: RunConfig, progress: Progress, stop: StopRequest) -> str | None:
    reason = stop.agreed()
    if reason is None and every(cfg.train.exit_interval, progress.iteration):
        reason = f"train.exit_interval={cfg.train.exit_interval}"
    return reason


def save(checkpointer: Checkpointer, stage: Stage, progress: Progress, run: RunContext, reporter: Reporter) -> None:
    with reporter.saving(progress, Path(run.cfg.checkpoint.save)), on_device(stage.engines.values()):
        state = state_to_save(stage, progress, run.mesh.host_group)
        checkpointer.save(progress.iteration, state, write_files(run), gradients(stage))
