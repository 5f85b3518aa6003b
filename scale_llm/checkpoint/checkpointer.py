"""Saving and loading sharded state dicts in megatron-core's `torch_dist` format.

A checkpoint is written under a temporary name, renamed when every rank has written its part, and named by the tracker
file last. So a run that is killed while saving finds the checkpoint before.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from scale_llm import __version__
from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.background import Asked, Pending, Publishing
from scale_llm.checkpoint.forked import Forked
from scale_llm.checkpoint.only_data import load_data, read_only_data
from scale_llm.checkpoint.part_writer import Written, write_part
from scale_llm.checkpoint.planning import Planning, write_beside
from scale_llm.checkpoint.retention import Retention, remove_behind, retire
from scale_llm.checkpoint.snapshot import left_out
from scale_llm.checkpoint.summed_file import to_disk
from scale_llm.config.checkpoint_files import CHECKPOINT_VERSION, iteration_dir, latest_checkpoint, write_latest
from scale_llm.config.errors import TryAgain, UserError

POLL_SECONDS = 0.005
"""Between two looks at a save that is waited for."""


class Checkpointer:
    """Saves into one directory. Every rank makes one and calls it at the same iterations.

    host_group: all ranks, over gloo.
    """

    def __init__(
        self, directory: str | Path, host_group: dist.ProcessGroup, *, asynchronous: bool = False,
        retention: Retention | None = None,
    ):  # fmt: skip
        self.directory, self._retention = Path(directory), retention or Retention()
        self._group, self._asynchronous = host_group, asynchronous
        self._planning = Planning()
        self._pending: Pending | None = None
        self._removal: threading.Thread | None = None

    def save(
        self, iteration: int, state: dict[str, Any], extra: Callable[[Path], None] | None = None,
        unneeded: Iterable[torch.Tensor] = (),
    ) -> None:  # fmt: skip
        """Writes one checkpoint; in the background where the checkpointer is asynchronous. What is written is the state
        as it is now, whatever becomes of its tensors.

        extra: called for rank 0 with the unfinished directory, to add files to it; in another process.
        unneeded: large tensors that are no part of the state, such as gradients: a background save is faster for it.

        Raises:
            TryAgain: it could not be written, on every rank; the checkpoint before is still the latest.
        """
        self.finish()
        unfinished = self._unfinished(iteration)
        changed, mine = self._planning.prepare(state)
        anew, needed = self._sums(int(changed), mine)
        self._agree(iteration, lambda: self._clear(unfinished, needed))

        def begin() -> None:
            part, write_index = self._planning.plan(state, unfinished, anew=anew > 0)
            beside = partial(write_beside, extra) if dist.get_rank() == 0 else None
            with left_out(unneeded):
                writing = Forked(partial(write_part, unfinished, part, beside))
            self._pending = Pending(iteration, write_index, writing)

        try:
            self._agree(iteration, begin)
        except UserError:
            if self._pending is not None:
                self._pending.part.stop()
                self._pending = None
            raise
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Publishes a background save that has finished; cheap when there is none. Every rank, every iteration."""
        if self._pending is not None:
            self._advance(self._pending)

    def finish(self) -> None:
        """Waits for a background save. Ranks ask each other time and again, so that no wait is too long for a
        collective."""
        while self._pending is not None:
            self._pending.wait(POLL_SECONDS)
            self._advance(self._pending)
        if self._removal is not None:
            self._removal.join()
            self._removal = None

    def _advance(self, pending: Pending) -> None:
        """One look at a background save, on every rank: it is written by all, then published by rank 0.

        What a look asks the other ranks is read at the next one, a step later: nobody waits for a rank that is behind.
        """
        if pending.asked is None:
            pending.asked = self._ask(pending)
            return
        asked, pending.asked = pending.asked, None
        asked.work.wait()
        running, failed = asked.totals.tolist()
        if running:
            pending.asked = self._ask(pending)
            return
        if failed or pending.publishing is not None:
            self._pending = None
            self._raise(pending.iteration, asked.problem, failed)
            return
        gathered: list[Any] | None = [None] * dist.get_world_size(self._group) if dist.get_rank() == 0 else None
        dist.gather_object(pending.part.outcome(), gathered, dst=0, group=self._group)
        pending.publishing = Publishing(partial(self._publish, pending, gathered) if gathered else None)

    def _ask(self, pending: Pending) -> Asked:
        """Begins to ask whether it still goes on anywhere, and whether there is a problem."""
        alive = pending.is_alive()
        problem = None if alive else pending.problem()
        totals = torch.tensor([int(alive), int(problem is not None)])
        return Asked(dist.all_reduce(totals, group=self._group, async_op=True), totals, problem)

    def _publish(self, pending: Pending, parts: list[Written]) -> None:
        """On rank 0. Everything is on the disk before a name says that it is there."""
        unfinished, final = self._unfinished(pending.iteration), iteration_dir(self.directory, pending.iteration)
        pending.write_index(parts)
        checksums.collect(unfinished, {name: entry for part in parts for name, entry in part.table.items()})
        to_disk(unfinished)
        former = final.with_name(f".{final.name}.former")
        if final.exists():
            os.replace(final, former)
        os.replace(unfinished, final)
        shutil.rmtree(former, ignore_errors=True)
        to_disk(self.directory)
        write_latest(self.directory, pending.iteration)
        to_disk(self.directory)
        self._remove_old(pending.iteration)

    def _unfinished(self, iteration: int) -> Path:
        return self.directory / f".{iteration_dir(self.directory, iteration).name}.partial"

    def _remove_old(self, iteration: int) -> None:
        if self._removal is not None:
            self._removal.join()
        try:
            retire(self._retention.surplus(self.directory, iteration))
        except OSError as error:  # the new one is there: that is what counts
            print(f"checkpoint.keep_last={self._retention.keep_last}: {error}", flush=True)
        if self._retention.keep_last is not None:
            self._removal = remove_behind(self.directory)

    def _clear(self, partial: Path, needed_bytes: int) -> None:
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            free = shutil.disk_usage(partial).free
            if free < needed_bytes:
                partial.rmdir()
                raise OSError(f"it takes {needed_bytes / 2**30:.2f} GiB")

    def _sums(self, *values: int) -> list[int]:
        """Of each value over all ranks."""
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals, group=self._group)
        return totals.tolist()

    def _agree(self, iteration: int, action: Callable[[], Any]) -> None:
        """Runs the action on every rank; where it failed on any, all raise the same error."""
        problem = None
        try:
            action()
        except CheckpointException as error:  # torch's, which is no Exception
            problem = "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
        except Exception as error:  # noqa: BLE001 - whatever went wrong on one rank, all must stop together
            problem = f"{type(error).__name__}: {error}"
        self._raise(iteration, problem, self._sums(int(problem is not None))[0])

    def _raise(self, iteration: int, problem: str | None, failed: int) -> None:
        """failed: on how many ranks there is a problem."""
        if failed:
            problems: list[str | None] = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(problems, problem, group=self._group)
            raise TryAgain(self._explain(iteration, sorted({p for p in problems if p})))

    def _explain(self, iteration: int, found: list[str]) -> list[str]:
        try:
            latest = latest_checkpoint(self.directory)
        except ValueError:
            latest = None
        kept = f"the checkpoint of iteration {latest[0]} is still whole" if latest else "there is no earlier checkpoint"
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        return [
            f"checkpoint.save={self.directory}: saving iteration {iteration} failed ({text.splitlines()[0]}); "
            f"{free / 2**30:.2f} GiB are free there; {kept}; make room or choose another directory, then run again"
            for text in found
        ]


class _CommonReader(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return load_data(Path(checkpoint_dir) / "common.pt")


def read_plain(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that is the same on every rank: numbers, names, the scheduler's position.

    Raises:
        UserError: it is damaged, holds foreign code, or was written by newer code than this.
    """
    plain = load_data(path / "common.pt")
    if not isinstance(plain, dict):
        raise UserError(f"{path / 'common.pt'}: holds a {type(plain).__name__}, not a table; name another checkpoint")
    version = plain.get("checkpoint_version", 0)
    if isinstance(version, int | float) and version > CHECKPOINT_VERSION:
        by = plain.get("written_by", "newer code")
        raise UserError(
            f"{path}: has checkpoint_version {version} (written by {by}), this scale_llm {__version__} reads up to "
            f"{CHECKPOINT_VERSION}; install the scale_llm that wrote it, or name another checkpoint"
        )
    return plain


def load_sharded(path: Path, state: dict[str, Any], *, optional: str | None = None) -> dict[str, Any]:
    """Fills the sharded state dict from a checkpoint of any layout.

    optional: tensors whose names begin so are left out of the result where the checkpoint has them not.

    Raises:
        UserError: tensors are missing or have other shapes, with all their names; see read_plain.
    """
    read_only_data()
    read_plain(path)
    if optional is not None:
        saved = dist_checkpointing.load_tensors_metadata(str(path))
        state = _without(state, optional, saved)
    _check_shapes(path, state)
    try:
        return dist_checkpointing.load(
            state, str(path), common_strategy=_CommonReader(), strict=StrictHandling.ASSUME_OK_UNEXPECTED
        )
    except CheckpointException as error:  # torch's, which is no Exception: what went wrong on any rank, on every rank
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, Exception) for cause in causes):
            raise
        texts = [f"{type(cause).__name__}: {cause}" if not isinstance(cause, UserError) else str(cause)
                 for cause in causes]  # fmt: skip
        raise UserError([f"{path}: {text}" for text in dict.fromkeys(texts)]) from error


def _without(state: dict[Any, Any], prefix: str, saved: dict[str, Any]) -> dict[Any, Any]:
    """The state, however deep, but for tensors whose names begin with the prefix and that were not saved."""
    return {
        name: _without(leaf, prefix, saved) if isinstance(leaf, dict) else leaf
        for name, leaf in state.items()
        if not (isinstance(leaf, ShardedTensor) and leaf.key.startswith(prefix) and leaf.key not in saved)
    }


def _check_shapes(path: Path, state: dict[str, Any]) -> None:
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    problems = []
    wanted = [leaf.build() if isinstance(leaf, ShardedTensorFactory) else leaf for leaf in nested_values(state)]
    for leaf in nested_values(wanted):
        if not isinstance(leaf, ShardedTensor):
            continue
        if leaf.key not in saved:
            remedy = (
                "it was saved with another optimizer or precision; start a new run_dir with checkpoint.load and "
                "checkpoint.no_load_optim=true"
                if "optimizer." in leaf.key
                else "the model of the checkpoint is another one"
            )
            problems.append(f"{path}: holds no tensor {leaf.key}; {remedy}")
        elif _unlike(saved[leaf.key].global_shape, leaf):
            remedy = (
                "set precision.fp8_amax_history_len to what it was"
                if "optimizer.fp8." in leaf.key
                else "use the model group the checkpoint was trained with"
            )
            problems.append(
                f"{path}: {leaf.key} has shape {tuple(saved[leaf.key].global_shape)}, the model wants "
                f"{tuple(leaf.global_shape)}; {remedy}"
            )
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    everywhere = list(dict.fromkeys(p for part in gathered for p in part))
    if everywhere:
        raise UserError(everywhere)


def _unlike(saved: tuple[int, ...], wanted: ShardedTensor) -> bool:
    """Whether shapes differ in more than the padding of the vocabulary, the first axis of some tensors."""
    first = 1 if wanted.allow_shape_mismatch else 0
    return len(saved) != len(wanted.global_shape) or tuple(saved[first:]) != tuple(wanted.global_shape[first:])


def per_rank_object(key: str, value: Any):
    """An object of this rank alone, saved under its position among all ranks."""
    return ShardedObject(key, value, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
