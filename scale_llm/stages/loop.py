"""The one training loop: resume, step, log, evaluate, save, stop."""

from collections.abc import Callable

from scale_llm.config.batch import global_batch_size, total_iterations, total_samples
from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from scale_llm.parallel.ranges import named
from scale_llm.stages.base import Evaluation, Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.health.health import Health
from scale_llm.stages.health.steps import GoBack
from scale_llm.stages.progress import Progress, StopRequest
from scale_llm.stages.report import Reporter
from scale_llm.stages.saving import Saving


def train(run: RunContext, stage: Stage) -> None:
    """Trains until the configuration's end, a stop request, or an error; the last state is saved. Where its health asks
    for it, the run goes back to an older checkpoint and on from there."""
    stop = StopRequest(run.mesh.host_group, run.cfg.train.exit_duration_in_mins)
    health, said = Health(run, stage), None
    saving = Saving(run, stage, health)
    run.watchdog.start()
    try:
        while True:
            try:
                return train_on(run, stage, saving, stop, health, said)
            except GoBack as back:
                run.watchdog.enter("going back", back.until)
                saving.go_back()
                said = health.go_back(back)
    finally:
        run.watchdog.close()
        run.profile.close()
        stage.close()


def train_on(
    run: RunContext, stage: Stage, saving: Saving, stop: StopRequest, health: Health, said: str | None
) -> None:
    """From the newest checkpoint to the end. said: why the run has gone back to it.

    Raises:
        GoBack: it has to be an older one.
    """
    cfg = run.cfg
    progress = saving.resume()
    health.resumed(progress)
    reporter = Reporter(run, stage.engine, progress, total_iterations(cfg.train), said)
    reason = None

    def evaluate(how: Callable[[], Evaluation]) -> None:
        run.watchdog.enter("evaluation", progress.iteration)
        with named("evaluation"):
            reporter.evaluation(progress, how())

    try:
        evaluate(lambda: stage.start(fresh=progress.iteration == 0))
        evaluated = progress.iteration
        reporter.say(run.profile.after(progress.iteration))
        while reason is None and not finished(cfg, progress):
            size = global_batch_size(cfg.train, progress.consumed_samples)
            if health.leaves_out(progress.iteration + 1):
                stage.leave_out(size)
                count(progress, size)
                reporter.left_out(progress)
            else:
                step(run, health, saving, reporter, progress, size)
            if every(cfg.train.eval_interval, progress.iteration):
                evaluate(stage.evaluate)
                evaluated = progress.iteration
            run.watchdog.enter("the end of a step", progress.iteration)
            saving.after_step(progress)
            reason = exit_reason(cfg, progress, stop)
            reporter.say(health.check_ranks(progress))
            saving.if_due(progress, reporter)
            reporter.say(run.profile.after(progress.iteration))
        saving.last(progress, reporter, done=finished(cfg, progress))
        if finished(cfg, progress) and evaluated != progress.iteration:
            evaluate(stage.evaluate)
    finally:
        reporter.close(progress, reason)


def step(run: RunContext, health: Health, saving: Saving, reporter: Reporter, progress: Progress, size: int) -> None:
    """One step of `size` samples.

    Raises:
        GoBack: it has gone wrong too often.
        UserError: the stage cannot go on.
    """
    run.watchdog.enter("a step", progress.iteration)
    reporter.step_started()
    with named(f"iteration {progress.iteration + 1}"):
        result = health.step(progress, size)
    count(progress, size, skipped=result.skipped)
    result, back = health.judged(progress, result)
    reporter.step_ended(progress, result, size)
    if back is not None:
        raise back
    if result.stop:
        saving.at_once(progress, reporter)
        raise UserError(list(result.stop))


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
