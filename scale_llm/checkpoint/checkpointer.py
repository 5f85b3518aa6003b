"""Saving and loading sharded state dicts in megatron-core's `torch_dist` format.

A checkpoint is written under a temporary name, renamed when every rank has written its part, and named by the tracker
file last. So a run that is killed while saving finds the checkpoint before.
"""

import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from scale_llm import __version__
from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.only_data import load_data, read_only_data
from scale_llm.checkpoint.results import use_results_files
from scale_llm.checkpoint.retention import Retention, remove_behind, retire
from scale_llm.config.checkpoint_files import CHECKPOINT_VERSION, iteration_dir, latest_checkpoint, write_latest
from scale_llm.config.errors import TryAgain, UserError


class Checkpointer:
    """Saves into one directory. Every rank makes one and calls it at the same iterations.

    host_group: all ranks, over gloo.
    """

    def __init__(
        self, directory: str | Path, host_group: dist.ProcessGroup, *, asynchronous: bool = False,
        retention: Retention | None = None,
    ):  # fmt: skip
        self.directory, self._retention = Path(directory), retention or Retention()
        self._removal: threading.Thread | None = None
        self._group, self._asynchronous = host_group, asynchronous
        self._queue = AsyncCallsQueue() if asynchronous else None
        use_results_files()

    def save(self, iteration: int, state: dict[str, Any], extra: Callable[[Path], None] | None = None) -> None:
        """Writes one checkpoint; in the background where the checkpointer is asynchronous.

        extra: called on rank 0 with the unfinished directory, to add files to it.

        Raises:
            TryAgain: it could not be written, on every rank; the checkpoint before is still the latest.
        """
        self.finish()
        final = iteration_dir(self.directory, iteration)
        unfinished = final.with_name(f".{final.name}.partial")
        needed = _bytes_to_write(state, self._group)
        self._agree(iteration, lambda: self._clear(unfinished, needed))
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        request: list[AsyncRequest] = []

        def write():
            made = dist_checkpointing.save(
                state, str(unfinished), strategy, validate_access_integrity=True, async_sharded_save=True
            )
            request.append(_with_checksums(made, unfinished))

        self._agree(iteration, write)

        def publish():
            if dist.get_rank() == 0:
                if extra is not None:
                    extra(unfinished)
                save_config(CheckpointingConfig(strategy.backend, strategy.version), str(unfinished))
                checksums.collect(unfinished)
                former = final.with_name(f".{final.name}.former")
                if final.exists():
                    os.replace(final, former)
                os.replace(unfinished, final)
                shutil.rmtree(former, ignore_errors=True)
                write_latest(self.directory, iteration)
                self._remove_old(iteration)

        # megatron-core's last step writes metadata.json on rank 0 while the others wait; a full disk there would leave
        # them waiting, so it is done in `publish`.
        request[0].finalize_fns[1:] = [publish]
        if self._queue is not None:
            self._queue.schedule_async_request(request[0])
            self._pending = iteration
        else:
            self._agree(iteration, lambda: _write_now(request[0]))
            self._agree(iteration, lambda: _finalize(request[0]))

    def poll(self) -> None:
        """Publishes a background save that has finished; cheap when there is none. Every rank, every iteration."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._agree(self._pending, lambda: self._queue.maybe_finalize_async_calls(blocking=False))

    def finish(self) -> None:
        """Waits for a background save."""
        if self._queue is not None and self._queue.get_num_unfinalized_calls():
            self._agree(self._pending, lambda: self._queue.maybe_finalize_async_calls(blocking=True))
        if self._removal is not None:
            self._removal.join()
            self._removal = None

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

    def _agree(self, iteration: int, action: Callable[[], Any]) -> None:
        """Runs the action on every rank; where it failed on any, all raise the same error."""
        problem = None
        try:
            action()
        except CheckpointException as error:  # torch's, which is no Exception
            problem = "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
        except Exception as error:  # noqa: BLE001 - whatever went wrong on one rank, all must stop together
            problem = f"{type(error).__name__}: {error}"
        problems: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        found = sorted({p for p in problems if p})
        if found:
            raise TryAgain(self._explain(iteration, found))

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


def _with_checksums(request: AsyncRequest, directory: Path) -> AsyncRequest:
    """The same request, which also takes checksums of this rank's files where it writes them: in the process of a
    background save, while training goes on."""
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(async_fn=partial(_write_and_note, request.async_fn, directory))


def _write_and_note(write: Callable[..., None], directory: Path, rank: int, buckets: list[Any], *more: Any) -> None:
    checksums.note(directory, rank, [name for _, name, _ in buckets], lambda: write(rank, buckets, *more))


def _write_now(request: AsyncRequest) -> None:
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    if request.async_fn is not None:
        request.async_fn(*arguments, **request.async_fn_kwargs)


def _finalize(request: AsyncRequest) -> None:
    dist.barrier()
    for function in request.finalize_fns:
        function()


def _bytes_to_write(state: dict[str, Any], group: dist.ProcessGroup) -> int:
    """Bytes of all tensors, each counted on the rank that writes it, over the whole job."""
    mine = 0
    for leaf in nested_values(state):
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory) and is_main_replica(leaf.replica_id):
            mine += leaf.data.numel() * leaf.data.element_size()
    total = torch.tensor([mine], dtype=torch.int64)
    dist.all_reduce(total, group=group)
    return int(total.item())


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
        state = {part: _without(tensors, optional, saved) for part, tensors in state.items()}
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


def _without(tensors: dict[str, Any], prefix: str, saved: dict[str, Any]) -> dict[str, Any]:
    """The tensors but for those whose names begin with the prefix and that were not saved."""
    return {
        name: leaf
        for name, leaf in tensors.items()
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
            problems.append(
                f"{path}: {leaf.key} has shape {tuple(saved[leaf.key].global_shape)}, the model wants "
                f"{tuple(leaf.global_shape)}; use the model group the checkpoint was trained with"
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
