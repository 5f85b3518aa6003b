"""Judges every step by its numbers: good, left out, or the sign that the run has to go back.

Going back and leaving out the samples since is what Chowdhery et al. 2022 (PaLM, section 5.1) did by hand.
"""

import statistics
from dataclasses import dataclass

from scale_llm.config.health import HealthConfig
from scale_llm.engine.engine import StepResult
from scale_llm.stages.progress import Progress

TO_DEVIATIONS = 1.3490
"""A normal distribution's middle half is so many standard deviations wide."""


class GoBack(Exception):
    """The run goes on from the newest checkpoint that is older than `first_bad`."""

    def __init__(self, reason: str, *, first_bad: int, until: int, leave_out: bool, kind: str):
        super().__init__(reason)
        self.reason, self.first_bad, self.until = reason, first_bad, until
        self.leave_out = leave_out
        """Whether the samples of the iterations up to `until` are left out then."""
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Judgement:
    """remark: a line for the log; back: why the run cannot go on from here."""

    remark: str | None = None
    back: GoBack | None = None


def judge(health: HealthConfig, progress: Progress, result: StepResult) -> Judgement:
    """Counts the step that progress has just come to. The same on every rank, as their results are."""
    if result.broken is not None:
        return _broken(health, progress, result.broken)
    progress.bad_steps = 0
    if health.loss_spike_sigmas is None or result.skipped:
        return Judgement()
    loss = next((value for name, value in result.metrics.items() if name.endswith("loss")), None)
    return Judgement() if loss is None else _compared(health, health.loss_spike_sigmas, progress, loss)


def _broken(health: HealthConfig, progress: Progress, what: str) -> Judgement:
    progress.nan_iterations += 1
    progress.bad_steps += 1
    if result := _times(progress.bad_steps, health.max_nan_steps):
        remark = f"iteration {progress.iteration}: {what}; nothing is learnt from it ({result})"
        return Judgement(remark)
    first = progress.iteration - progress.bad_steps + 1
    reason = f"iteration {progress.iteration}: {what}"
    if progress.bad_steps > 1:
        reason += f", the last of {progress.bad_steps} steps in a row without a number"
    return Judgement(back=GoBack(reason, first_bad=first, until=progress.iteration, leave_out=True, kind="nan"))


def _times(count: int, limit: int) -> str | None:
    return f"{count} in a row, {limit} send the run back" if count < limit else None


def _compared(health: HealthConfig, sigmas: float, progress: Progress, loss: float) -> Judgement:
    recent = progress.recent_losses
    high = False
    if len(recent) >= health.loss_spike_window:
        low_quarter, middle, high_quarter = statistics.quantiles(recent, n=4)
        limit = middle + sigmas * (high_quarter - low_quarter) / TO_DEVIATIONS
        high = loss > limit
    if not high:
        progress.high_losses = 0
        progress.recent_losses = [*recent, loss][-health.loss_spike_window :]
        return Judgement()
    progress.high_losses += 1
    said = f"iteration {progress.iteration}: loss {loss:.4f} is above {limit:.4f} (median {middle:.4f} and {sigmas:g} "
    said += "standard deviations)"
    if result := _times(progress.high_losses, health.loss_spike_steps):
        return Judgement(f"{said}: {result}")
    first = progress.iteration - progress.high_losses + 1
    return Judgement(back=GoBack(said, first_bad=first, until=progress.iteration, leave_out=True, kind="spike"))
