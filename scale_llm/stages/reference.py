"""What a frozen model thinks of every answer: computed once and kept, again for each batch, or by the policy itself
without its adapters.

The first two compute each unit alone, in a row of its own, so that its bits do not depend on what is trained beside it,
and they agree bit for bit.
"""

import hashlib
import os
from copy import deepcopy
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.checkpoint.bases import base_of
from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.stage import DpoConfig, ReferenceModel
from scale_llm.data.files import fingerprint, stamp
from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.engine.engine import Engine
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from scale_llm.stages.sequence_values import log_probs_of
from scale_llm.stages.sequences import most


class Reference(Protocol):
    def log_probs(self, policy: Engine, numbers: np.ndarray) -> torch.Tensor:
        """Of the answers of these sequences, FP32 [n]. A collective of the ranks that share the micro-batch."""


def reference_of(run: RunContext, stage: DpoConfig, sequences: TokenSequences, groups: np.ndarray) -> Reference:
    """As configured. groups: int [u + 1], unit i has sequences groups[i] to groups[i + 1]."""
    if stage.reference is ReferenceModel.base:
        return BaseReference(run, sequences)
    start = _start(run, stage)
    kind = CachedReference if stage.reference is ReferenceModel.cached else LiveReference
    return kind(run, start, sequences, groups)


class BaseReference:
    """The policy without its adapters."""

    def __init__(self, run: RunContext, sequences: TokenSequences):
        if base_of(_load(run.cfg.checkpoint.load)) is not None:
            raise UserError(
                f"stage.reference=base: checkpoint.load={run.cfg.checkpoint.load} holds adapters, so that the base is "
                "not where the policy starts; merge them (tools/convert_checkpoint.py merge), or set "
                "stage.reference=cached"
            )
        self._run, self._sequences = run, sequences

    def log_probs(self, policy: Engine, numbers: np.ndarray) -> torch.Tensor:
        samples = [[int(number)] for number in numbers]
        with policy.base():
            found = log_probs_of(
                self._run, policy, self._sequences, samples, row_tokens=self._run.cfg.model.seq_length
            )  # fmt: skip
        return torch.tensor([found[int(number)] for number in numbers], dtype=torch.float32)


class LiveReference:
    """A frozen model beside the policy."""

    def __init__(self, run: RunContext, start: Path, sequences: TokenSequences, groups: np.ndarray):
        self._run, self._sequences, self._groups = run, sequences, groups
        self._unit_of = np.repeat(np.arange(len(groups) - 1), np.diff(groups))
        self._engine = Engine(deepcopy(run.cfg), run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
        load_weights(run, self._engine, start)

    def log_probs(self, policy: Engine, numbers: np.ndarray) -> torch.Tensor:
        found = self.of_units(sorted({int(self._unit_of[number]) for number in numbers}))
        return torch.tensor([found[int(number)] for number in numbers], dtype=torch.float32)

    def of_units(self, units: list[int]) -> dict[int, float]:
        """Values of all sequences of these units by their numbers."""
        found: dict[int, float] = {}
        for turn in range(most(len(units), self._run.mesh)):
            samples = [self._members(units[turn])] if turn < len(units) else []
            found |= log_probs_of(self._run, self._engine, self._sequences, samples)
        return found

    def _members(self, unit: int) -> list[int]:
        return list(range(int(self._groups[unit]), int(self._groups[unit + 1])))


class CachedReference:
    """Values of all sequences, from run_dir/reference/<fingerprint>.npy; made where they are not there yet."""

    def __init__(self, run: RunContext, start: Path, sequences: TokenSequences, groups: np.ndarray):
        path = Path(run.cfg.run_dir) / "reference" / f"{_fingerprint(run, start, sequences)}.npy"
        there = [path.is_file()]
        dist.broadcast_object_list(there, src=0, group=run.mesh.host_group)
        if not there[0]:
            self._values = _values(run, start, sequences, groups)
            if dist.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".tmp{os.getpid()}.npy")
                np.save(temporary, self._values)
                os.replace(temporary, path)
        else:
            self._values = np.load(path)
        if len(self._values) != len(sequences.lengths) or not np.isfinite(self._values).all():
            raise UserError(
                f"{path}: holds {len(self._values)} log-probabilities for {len(sequences.lengths)} answers, "
                f"{int((~np.isfinite(self._values)).sum())} of them no number; delete it and run again"
            )

    def log_probs(self, policy: Engine, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._values[numbers])


def _start(run: RunContext, stage: DpoConfig) -> Path:
    """The checkpoint that the reference is, by default the one that the policy starts from."""
    return _load(stage.reference_load or run.cfg.checkpoint.load)


def _load(directory: str | None) -> Path:
    found = latest_checkpoint(directory or "")
    assert found is not None, "validated"
    return found[1]


def _fingerprint(run: RunContext, start: Path, sequences: TokenSequences) -> str:
    """Of the model and the data: another of either, or other answers chosen of the data, has another name."""
    files = sorted(str(file) for file in start.iterdir() if file.is_file())
    shape = hashlib.sha256(repr((run.cfg.model, run.cfg.precision, run.cfg.peft)).encode()).hexdigest()
    lengths = hashlib.sha256(sequences.lengths.tobytes()).hexdigest()
    return fingerprint([[stamp(file) for file in files], shape, run.prepared.path, lengths])


def _values(run: RunContext, start: Path, sequences: TokenSequences, groups: np.ndarray) -> np.ndarray:
    """Every data-parallel rank takes its share of units; the frozen model is let go afterwards."""
    mine = np.zeros(len(sequences.lengths), dtype=np.float32)
    share = list(range(run.mesh.dp_rank, len(groups) - 1, run.mesh.sizes.dp))
    for number, value in LiveReference(run, start, sequences, groups).of_units(share).items():
        mine[number] = value
    total = torch.from_numpy(mine).to(run.device.device)
    dist.all_reduce(total, group=run.mesh.groups.dp)
    return total.cpu().numpy()
