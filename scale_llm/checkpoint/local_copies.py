"""Frequent copies of a run's state on the nodes' own disks, each also on another node.

They are for restarts of the same run on the same layout: every rank writes what it holds, as it holds it. A node that
comes back empty gets its ranks' parts from the nodes that keep copies of them. What can go wrong with them ends no
run: the checkpoints in checkpoint.save are there as without them.
"""

import threading
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.checkpoint.forked import Forked
from scale_llm.checkpoint.local_exchange import exchange, peers
from scale_llm.checkpoint.local_files import Copy, Shelf
from scale_llm.checkpoint.only_data import load_data
from scale_llm.checkpoint.snapshot import held, left_out
from scale_llm.config.io import write_text

IDENTITY = ".run_identity"
"""In checkpoint.save: a run that begins anew in the same directory is another one."""


@dataclass(frozen=True, slots=True)
class FoundCopy:
    """iteration: of the newest copy that is whole on all ranks, None: there is none. remarks: why others were not
    taken, a line each."""

    iteration: int | None
    remarks: list[str] = field(default_factory=list)


class LocalCopies:
    """Copies of one run. All ranks make one and call it at the same iterations.

    directory: of this rank. group: all ranks, over gloo, used by nobody else; host_group: the same for collectives.
    """

    def __init__(
        self, directory: Path, *, group: dist.ProcessGroup, host_group: dist.ProcessGroup, run: str,
        layout: dict[str, Any], ranks_per_node: int, replicas: int,
    ):  # fmt: skip
        self._shelf, self._group, self._host_group = Shelf(directory), group, host_group
        self._run, self._layout = run, layout
        self._rank = dist.get_rank()
        self._peers = peers(self._rank, dist.get_world_size(), ranks_per_node, replicas)
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._newest: int | None = None
        self._whole: int | None = None

    def save(
        self, iteration: int, tensors: dict[str, torch.Tensor], plain: dict[str, Any], *, after: int,
        unneeded: list[torch.Tensor],
    ) -> list[str]:  # fmt: skip
        """Begins to write this rank's part as it is now, and to send it; the two newest that are whole stay. Returns
        what went wrong with the one before, on any rank.

        plain: data that `load_data` reads. after: the newest checkpoint. unneeded: see Checkpointer.save.
        """
        remarks = self.finish()
        self._shelf.forget_but(self._whole)
        copy = Copy(run=self._run, layout=self._layout, after=after, iteration=iteration, rank=self._rank)
        kept = dict(zip(tensors, held(tensors.values()), strict=True))
        with left_out(unneeded):
            writing = Forked(partial(self._shelf.write, copy, kept, plain))
        del kept
        self._newest = iteration
        # A daemon: a run that ends with an error does not wait for ranks that may be gone
        self._thread = threading.Thread(target=self._replicate, args=(writing,), daemon=True)
        self._thread.start()
        return remarks

    def finish(self) -> list[str]:
        """Waits until what was begun is written and sent, and agrees with all ranks whether it is whole."""
        if self._thread is None:
            return []
        self._thread.join()
        self._thread = None
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self._problem, group=self._host_group)
        found = [f"local copy of iteration {self._newest}, rank {rank}: {problem}; the run goes on without it"
                 for rank, problem in enumerate(problems) if problem]  # fmt: skip
        if not found:
            self._whole = self._newest
        return found

    def forget(self) -> list[str]:
        """Removes all that this rank keeps; returns what `finish` does."""
        remarks = self.finish()
        self._shelf.forget_but(None)
        self._newest = self._whole = None
        return remarks

    def _replicate(self, writing: Forked[Copy]) -> None:
        """In a thread: what this rank wrote goes to others, theirs come here."""
        self._problem = writing.problem()
        mine = writing.outcome() if self._problem is None else None
        for to, source in self._peers:
            try:
                exchange(self._shelf, self._group, send=mine, to=to, source=source)
            except (OSError, RuntimeError) as error:
                self._problem = self._problem or f"{type(error).__name__}: {error}"

    def find(self, newer_than: int, tracker: int, *, hashing: bool) -> FoundCopy:
        """Looks for the newest copy that all ranks have, on their own or on another node, and has every rank's part
        where it belongs. A collective.

        newer_than: iteration of the checkpoint that would be taken otherwise; tracker: of the one that the tracker
        named: copies made after a newer one were left behind on purpose. hashing: compare checksums of what is taken.
        """
        kept, remarks = self._mine(tracker)
        while True:
            holders, told = self._holders(kept, remarks)
            whole = [i for i, of in holders.items() if i > newer_than and set(of) == set(range(dist.get_world_size()))]
            if not whole:
                return FoundCopy(None, told)
            iteration = max(whole)
            wrong = self._verify(kept, holders[iteration], iteration) if hashing else []
            remarks += wrong
            if any(self._all(bool(wrong))):
                continue
            self._fetch(kept, holders[iteration], iteration)
            if all(self._all((iteration, self._rank) in kept)):
                self._newest = self._whole = iteration
                return FoundCopy(iteration, self._told(remarks))
            remarks.append(f"local copy of iteration {iteration}: could not be brought to rank {self._rank}")
            kept = {key: copy for key, copy in kept.items() if key[0] != iteration}

    def load(self, iteration: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, plain data) of this rank.

        Raises:
            UserError: they hold foreign code.
        """
        path = self._shelf.path(iteration, self._rank)
        found = load_data(path)
        return found["tensors"], found["plain"]

    def _mine(self, tracker: int) -> tuple[dict[tuple[int, int], Copy], list[str]]:
        """Copies of this rank's shelf that may be taken, by iteration and rank, and remarks on the others."""
        kept, remarks = {}, []
        for copy in self._shelf.copies():
            problem = copy if isinstance(copy, str) else self._shelf.problem(copy, hashing=False)
            if isinstance(copy, Copy) and problem is None:
                problem = self._unfit(copy, tracker)
            if isinstance(copy, Copy) and problem is None:
                kept[copy.iteration, copy.rank] = copy
            elif problem is not None:
                remarks.append(problem)
        return kept, remarks

    def _unfit(self, copy: Copy, tracker: int) -> str | None:
        path = self._shelf.path(copy.iteration, copy.rank).parent
        if copy.run != self._run:
            return f"{path}: is of another run that was here before"
        if copy.layout != self._layout:
            different = sorted(key for key in {*copy.layout, *self._layout}
                               if copy.layout.get(key) != self._layout.get(key))  # fmt: skip
            return f"{path}: is of another layout ({', '.join(different)})"
        if copy.after > tracker:
            return f"{path}: is from after checkpoint {copy.after}, the tracker names {tracker}: left behind on purpose"
        return None

    def _holders(self, kept: dict[tuple[int, int], Copy], remarks: list[str]) -> tuple[dict, list[str]]:
        """iteration -> rank -> rank that holds its part, itself where it does; and the remarks of all ranks."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (list(kept), remarks), group=self._host_group)
        holders: dict[int, dict[int, int]] = {}
        for holder, (keys, _) in enumerate(gathered):
            for iteration, rank in keys:
                found = holders.setdefault(iteration, {})
                if rank not in found or rank == holder:
                    found[rank] = holder
        return holders, list(dict.fromkeys(line for _, lines in gathered for line in lines))

    def _told(self, remarks: list[str]) -> list[str]:
        return self._holders({}, remarks)[1]

    def _verify(self, kept: dict[tuple[int, int], Copy], of: dict[int, int], iteration: int) -> list[str]:
        """Damage of what this rank would supply, which is taken out of `kept`."""
        wrong = []
        for rank in [rank for rank, holder in of.items() if holder == self._rank]:
            problem = self._shelf.problem(kept[iteration, rank], hashing=True)
            if problem is not None:
                wrong.append(problem)
                del kept[iteration, rank]
        return wrong

    def _fetch(self, kept: dict[tuple[int, int], Copy], of: dict[int, int], iteration: int) -> None:
        """Parts that are not with their rank are sent there, one after another."""
        for rank, holder in sorted(of.items()):
            if rank == holder or self._rank not in (rank, holder):
                continue
            try:
                if self._rank == holder:
                    exchange(self._shelf, self._group, send=kept[iteration, rank], to=rank)
                else:
                    copy = exchange(self._shelf, self._group, source=holder)
                    if copy is not None:
                        kept[iteration, rank] = copy
            except OSError as error:
                print(f"{self._shelf.directory}: {error}", flush=True)

    def _all(self, value: bool) -> list[bool]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._host_group)
        return values


def run_identity(directory: Path, group: dist.ProcessGroup) -> str:
    """Of the run that saves into the directory; a new one where it has none yet. A collective."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        path = directory / IDENTITY
        if not path.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            write_text(path, uuid.uuid4().hex)
        told = [path.read_text(encoding="utf-8").strip()]
    dist.broadcast_object_list(told, src=0, group=group)
    return told[0]
