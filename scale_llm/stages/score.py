"""Rewards of the answers in a file: run_dir/scores.jsonl has the rows of data.path, each with its `score`.

What is scored is the last assistant turn of each row, in the forms that stage=sft reads. Rows that cannot be scored are
left out, as data.on_bad_row and data.on_too_long say.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.data import BadRow
from scale_llm.data.chat.examples import Examples, load_examples
from scale_llm.data.chat.reading import Report, bad_rows
from scale_llm.data.progress import count_progress
from scale_llm.data.rows import read_rows
from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.engine.engine import Engine
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from scale_llm.stages.sequence_values import scores_of
from scale_llm.stages.sequences import most

FILE = "scores.jsonl"
CHUNK = 64
"""Rows of data.path that a rank scores between two steps of the progress bar."""


def score(run: RunContext) -> None:
    """Prints a summary and writes run_dir/scores.jsonl."""
    cfg = run.cfg
    found = latest_checkpoint(cfg.checkpoint.load or "")
    assert found is not None, "validated"
    examples = load_examples(run.prepared)
    engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
    load_weights(run, engine, found[1])
    scores = scores_of_all(run, engine, examples)
    if dist.get_rank() == dist.get_world_size() - 1:
        path = Path(cfg.run_dir) / FILE
        write_scores(path, examples, scores, cfg.data.on_bad_row)
        spread = f"mean: {scores.mean():.6g} | std: {scores.std():.6g} | min: {scores.min():.6g}"
        print(f" scores | rows: {len(scores)} | {spread} | max: {scores.max():.6g} | file: {path} |", flush=True)


def scores_of_all(run: RunContext, engine: Engine, sequences: TokenSequences) -> np.ndarray:
    """FP32 [n], on every rank. Data-parallel ranks share the work."""
    sizes, count = run.mesh.sizes, len(sequences.lengths)
    mine = list(range(run.mesh.dp_rank, count, sizes.dp))
    values = np.zeros(count, dtype=np.float32)
    turns = most(-(-len(mine) // CHUNK), run.mesh)
    shows = run.cfg.logging.progress and dist.get_rank() == 0
    with count_progress("score", turns, shows) as on_turn:
        for turn in range(turns):
            part = scores_of(run, engine, sequences, mine[turn * CHUNK : (turn + 1) * CHUNK])
            values[list(part)] = list(part.values())
            on_turn(1)
    total = torch.from_numpy(values).to(run.device.device)
    dist.all_reduce(total, group=run.mesh.groups.dp)
    return total.cpu().numpy()


def write_scores(path: Path, examples: Examples, scores: np.ndarray, bad: BadRow) -> None:
    """The rows that were scored, in their order, each with its score; whole or not at all."""
    wanted = {examples.where(number): float(scores[number]) for number in range(len(scores))}
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        for values, where in _rows(examples.files, bad):
            if where in wanted:
                file.write(json.dumps({**values, "score": wanted[where]}, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, path)


def _rows(files: list[str], bad: BadRow) -> Iterator[tuple[dict, str]]:
    problems = bad_rows(bad, Report(files=files))  # as they were read before
    for name in files:
        for row in read_rows(name, problems):
            yield row.values, f"{row.file}:{row.line}"
