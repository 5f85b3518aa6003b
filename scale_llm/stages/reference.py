"""What a frozen copy of the starting model thinks of every answer: computed once and kept, or again for each batch.

Either way each comparison is computed alone, in a row of its own, so that its bits do not depend on what is trained
beside it, and the two ways agree bit for bit.
"""

import hashlib
import os
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.stage import Batching
from scale_llm.data.files import fingerprint, stamp
from scale_llm.data.sequence_loader import SequenceLoader, Shape, TokenSequences
from scale_llm.engine.engine import Engine
from scale_llm.losses.direct_preference import answer_log_probs
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from scale_llm.stages.sequences import row_unit


class Reference(Protocol):
    def log_probs(self, numbers: np.ndarray) -> torch.Tensor:
        """Of the answers of these sequences, FP32 [n]. A collective of the ranks that share the micro-batch."""


class LiveReference:
    """A frozen model beside the policy."""

    def __init__(self, run: RunContext, sequences: TokenSequences, groups: np.ndarray):
        """groups: [k + 1], comparison i has the sequences groups[i] to groups[i + 1]."""
        self._sequences, self._groups, self._run = sequences, groups, run
        self._of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))
        cfg = deepcopy(run.cfg)
        found = latest_checkpoint(cfg.checkpoint.load)
        assert found is not None, "validated"
        self.engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
        load_weights(run, self.engine, found[1])
        groups_of = run.mesh.groups
        self._fn = partial(
            answer_log_probs, tp_group=groups_of.tp, cp_group=groups_of.cp, vocab_size=run.vocab_size
        )  # fmt: skip

    def log_probs(self, numbers: np.ndarray) -> torch.Tensor:
        found = {number: value for which in self._comparisons(numbers) for number, value in self._compute(which)}
        return torch.tensor([found[int(number)] for number in numbers], dtype=torch.float32)

    def _comparisons(self, numbers: np.ndarray) -> list[int]:
        return sorted({int(self._of[number]) for number in numbers})

    def _compute(self, comparison: int) -> list[tuple[int, float]]:
        """The sequences of one comparison with their values, the same on every rank of the pipeline."""
        members = list(range(int(self._groups[comparison]), int(self._groups[comparison + 1])))
        places = int(sum(self._sequences.lengths[number] - 1 for number in members))
        unit = row_unit(self._run.cfg, self._run.mesh)
        shape = Shape(batching=Batching.packed, row_tokens=-(-places // unit) * unit, numbered=True)
        stream = _One(members)
        (batch,) = SequenceLoader(
            self._sequences, stream, shape, data_parallel_rank=0, data_parallel_size=1
        ).global_batch(0, 1)
        result = self.engine.forward([batch], lambda logits, placed: self._fn(logits, placed)[0])
        mesh = self._run.mesh
        values = result[0] if result else torch.zeros(len(members), device=self._run.device.device)
        if mesh.sizes.pp > 1:
            dist.broadcast(values, src=mesh.last_stage_rank, group=mesh.groups.pp)
        return list(zip(members, values.tolist(), strict=True))


class _One:
    """A stream of one sample."""

    def __init__(self, members: list[int]):
        self._members = members

    def sample(self, index: int) -> list[int]:
        return self._members

    def samples_in(self, epochs: float) -> int:
        return 1


class CachedReference:
    """Values of all sequences, from run_dir/reference/<fingerprint>.npy; made where they are not there yet."""

    def __init__(self, run: RunContext, sequences: TokenSequences, groups: np.ndarray):
        path = Path(run.cfg.run_dir) / "reference" / f"{self._fingerprint(run)}.npy"
        there = [path.is_file()]
        dist.broadcast_object_list(there, src=0, group=run.mesh.host_group)
        if not there[0]:
            values = self._make(run, sequences, groups)
            if dist.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".tmp{os.getpid()}.npy")
                np.save(temporary, values)
                os.replace(temporary, path)
            self._values = values
        else:
            self._values = np.load(path)
        if len(self._values) != len(sequences.lengths) or not np.isfinite(self._values).all():
            raise UserError(
                f"{path}: holds {len(self._values)} log-probabilities for {len(sequences.lengths)} answers, "
                f"{int((~np.isfinite(self._values)).sum())} of them no number; delete it and run again"
            )

    def log_probs(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._values[numbers])

    @staticmethod
    def _fingerprint(run: RunContext) -> str:
        """Of the model and the data: another of either has another name."""
        found = latest_checkpoint(run.cfg.checkpoint.load)
        assert found is not None, "validated"
        files = sorted(str(file) for file in found[1].iterdir() if file.is_file())
        shape = hashlib.sha256(repr((run.cfg.model, run.cfg.precision, run.cfg.peft)).encode()).hexdigest()
        return fingerprint([[stamp(file) for file in files], shape, run.prepared.path])

    @staticmethod
    def _make(run: RunContext, sequences: TokenSequences, groups: np.ndarray) -> np.ndarray:
        """Every data-parallel rank takes its share of comparisons; the frozen model is let go afterwards."""
        live = LiveReference(run, sequences, groups)
        mine = np.zeros(len(sequences.lengths), dtype=np.float32)
        for comparison in range(run.mesh.dp_rank, len(groups) - 1, run.mesh.sizes.dp):
            for number, value in live._compute(comparison):
                mine[number] = value
        total = torch.from_numpy(mine).to(run.device.device)
        dist.all_reduce(total, group=run.mesh.groups.dp)
        return total.cpu().numpy()
