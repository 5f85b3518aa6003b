"""The health of one run: what the loop asks before, in and after every step. Decisions are the same on every rank."""

import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from scale_llm.config import timeline
from scale_llm.config.checkpoint_files import iteration_dir, saved_iterations, write_latest
from scale_llm.config.errors import UserError
from scale_llm.config.policy import PpoConfig
from scale_llm.config.stage import PretrainConfig
from scale_llm.engine.engine import StepResult
from scale_llm.engine.offload import on_device
from scale_llm.engine.replicas import Different, unlike_replicas
from scale_llm.parallel.first import on_first
from scale_llm.parallel.rng import rng_state, set_rng_state
from scale_llm.stages.base import Stage
from scale_llm.stages.context import RunContext
from scale_llm.stages.health.steps import GoBack, Judgement, judge
from scale_llm.stages.health.stragglers import Stragglers
from scale_llm.stages.progress import Progress


class SilentCorruption(RuntimeError):
    """The same rank has held other weights than its replicas twice."""


class Health:
    """Every rank makes one and asks it the same."""

    def __init__(self, run: RunContext, stage: Stage):
        self._run, self._stage, self._health = run, stage, run.cfg.health
        self._group = run.mesh.host_group
        self._left_out = set(run.cfg.train.iterations_to_skip) | on_first(self._group, self._left_out_before)
        self._resumed_at, self._is_good, self._went_back = 0, False, False
        self._rewinds, self._unlike = 0, set[int]()
        self._stragglers = None
        if self._health.straggler_interval is not None:
            self._stragglers = Stragglers(
                run.device, self._group, self._health.straggler_factor, sees_kernels=self._kernels_compare()
            )

    def _kernels_compare(self) -> bool:
        """Whether kernels of one name do the same in every step and on every rank, and no other profiler sees them:
        where steps have ever other tokens, a kernel that takes longer says nothing."""
        return isinstance(self._run.cfg.stage, PretrainConfig) and self._run.cfg.profile.start is None

    def _left_out_before(self) -> set[int]:
        """By starts of this run before: the timeline is what remembers."""
        ranges = [
            event["leave_out"]
            for event in timeline.read(self._run.cfg.run_dir)
            if event["event"] == "rewind" and event["leave_out"]
        ]
        return {iteration for first, last in ranges for iteration in range(first, last + 1)}

    def resumed(self, progress: Progress) -> None:
        """The run goes on from here."""
        self._resumed_at, self._is_good = progress.iteration, False

    def may_save(self, progress: Progress) -> bool:
        """Whether weights are known to be good: a step since the run went on from here, the last one, had numbers, and
        the loss is not high."""
        return self._is_good and not progress.bad_steps and not progress.high_losses

    def leaves_out(self, iteration: int) -> bool:
        """Whether the samples of an iteration are counted and nothing else."""
        return iteration in self._left_out

    def step(self, progress: Progress, size: int) -> StepResult:
        """One step of the stage; of a broken one random numbers are given back, as if it had not been."""
        if progress.iteration + 1 in self._health.drill_nan_gradients and dist.get_rank() == 0:
            engine = next(engine for engine in self._stage.engines.values() if engine is not None)
            engine.spoil_next_gradient()
        before = rng_state()
        with self._watched(progress.iteration + 1):
            result = self._stage.step(progress.consumed_samples, size)
        if result.broken is not None and result.skipped:
            set_rng_state(before)
        return result

    def judged(self, progress: Progress, result: StepResult) -> tuple[StepResult, GoBack | None]:
        """The result with what is to be said of it, and why the run has to go back."""
        found = judge(self._health, progress, result)
        if found == Judgement():
            self._is_good = True
            return result, None
        said = found.remark if found.back is None else found.back.reason
        if found.back is None:  # of those that go back the timeline has what follows
            self._note("nan" if result.broken else "high loss", iteration=progress.iteration, reason=said)
        return replace(result, remarks=(*result.remarks, said)), found.back

    def check_ranks(self, progress: Progress) -> list[str]:
        """Compares ranks where it is time to; remarks.

        Raises:
            GoBack: weights that should be the same are not.
            SilentCorruption: they are not, and it is the same rank as before.
        """
        interval = self._health.check_weight_hash_across_dp_replicas_interval
        if interval is not None and progress.iteration % interval == 0:
            self.check_replicas(progress)
        return self._slow_ranks(progress.iteration) if self._times_ranks(progress.iteration) else []

    def _times_ranks(self, iteration: int) -> bool:
        interval = self._health.straggler_interval
        return interval is not None and iteration % interval == 0

    def _watched(self, iteration: int) -> AbstractContextManager:
        """Around the step to this iteration: the last before ranks are timed shows its kernels, too."""
        if self._stragglers is None or not self._times_ranks(iteration):
            return nullcontext()
        return self._stragglers.watched()

    def _slow_ranks(self, iteration: int) -> list[str]:
        """Times the ranks and notes what is found; remarks."""
        assert self._stragglers is not None
        (slow, scores), remarks = self._stragglers.check(), []
        if scores is not None:
            self._note("straggler report", iteration=iteration, **scores.lowest())
        for one in slow:
            remarks.append(f"rank {one.rank} on {one.host} takes {one.times:.1f} times as long as {one.than} for the "
                           "same work")  # fmt: skip
            self._note("straggler", iteration=iteration, rank=one.rank, host=one.host, times=round(one.times, 2),
                       than=one.than)  # fmt: skip
        return remarks

    def check_replicas(self, progress: Progress) -> None:
        """Before a save too, so that no checkpoint holds what one rank has got wrong."""
        if self._health.check_weight_hash_across_dp_replicas_interval is None:
            return
        with on_device(self._stage.engines.values()):
            mine = {name: unlike_replicas(engine) for name, engine in self._stage.engines.items() if engine is not None}
        told: list[Any] = [None] * dist.get_world_size(self._group)
        found: list[Different] = [different for different in mine.values() if different is not None]
        dist.all_gather_object(told, (socket.gethostname(), found), group=self._group)
        ranks = sorted({rank for _, part in told for different in part for rank in different.ranks})
        if not ranks:
            return
        first = next(different for _, part in told for different in part)
        where = ", ".join(f"rank {rank} on {told[rank][0]}" for rank in ranks)
        reason = f"iteration {progress.iteration}: the weights of {where} are unlike those of its replicas"
        reason += f" ({first.name}{f' and {first.tensors - 1} other tensors' if first.tensors > 1 else ''})"
        self._note("corruption", iteration=progress.iteration, ranks=ranks, hosts=sorted({told[r][0] for r in ranks}),
                   reason=reason)  # fmt: skip
        if again := self._unlike & set(ranks):
            raise SilentCorruption(f"{reason}, for the second time: its hardware is to be looked at, rank {min(again)}")
        self._unlike |= set(ranks)
        raise GoBack(reason, first_bad=progress.iteration, until=progress.iteration, leave_out=False, kind="corruption")

    def saved(self) -> None:
        """A checkpoint of weights that are good is there: whoever goes back from now on gets further."""
        self._rewinds = 0

    def go_back(self, back: GoBack) -> str:
        """Has the next `resume` find an older checkpoint; what to say of it.

        Raises:
            UserError: there is none, or the run has been here too often.
        """
        target = on_first(self._group, lambda: self._chosen(back))
        if back.leave_out:
            self._left_out |= set(range(target + 1, back.until + 1))
        self._rewinds, self._went_back = self._rewinds + 1, True
        rest = f", without the samples of iterations {target + 1} to {back.until}" if back.leave_out else ""
        return f"{back.reason}; going back to iteration {target}{rest}"

    def _chosen(self, back: GoBack) -> int:
        """The iteration to go back to, which the tracker and the timeline then name. On rank 0."""
        cfg = self._run.cfg
        critic = f" or stage.critic_lr={cfg.stage.critic_lr}" if isinstance(cfg.stage, PpoConfig) else ""
        remedy = (
            f"lower optim.lr={cfg.optim.lr}{critic}, set optim.clip_grad, or look at the samples of iterations "
            f"{back.first_bad} to {back.until}"
        )
        if self._rewinds >= self._health.max_rewinds:
            raise UserError(f"{back.reason}; the run has gone back {self._rewinds} times without a new checkpoint "
                            f"(health.max_rewinds={self._health.max_rewinds}): {remedy}")  # fmt: skip
        # Straight after a return the checkpoint itself is what is wrong, not the samples
        newest = back.first_bad - 1 if self._is_good or not self._went_back else self._resumed_at - 1
        directory = cfg.checkpoint.save
        found = next((i for i in saved_iterations(directory) if i <= newest), None)
        if found is None:
            raise UserError(f"{back.reason}; no checkpoint from before is in {directory} to go back to: set "
                            f"checkpoint.save_interval; {remedy}")  # fmt: skip
        leave_out = [found + 1, back.until] if back.leave_out else None
        write_latest(directory, found)
        self._note(
            "rewind", iteration=back.until, to=found, leave_out=leave_out, kind=back.kind, reason=back.reason,
            checkpoint=iteration_dir(directory, found).name,
        )  # fmt: skip
        return found

    def _note(self, event: str, **facts: Any) -> None:
        if dist.get_rank() == 0:
            timeline.append(self._run.cfg.run_dir, event, **facts)
