"""What was said and what it was worth: run_dir/transcripts.jsonl, and the same in TensorBoard."""

import html
import json
from pathlib import Path

import torch

from scale_llm.data.tokenizer import Tokenizer
from scale_llm.stages.policy.answers import Answers
from scale_llm.stages.policy.scoring import Scorer
from scale_llm.stages.report import open_rows

FILE = "transcripts.jsonl"
TAG = "transcripts"


class Transcripts:
    """A few answers of every iteration, the first of the first prompts."""

    def __init__(self, run_dir: str, count: int, tokenizer: Tokenizer, scorer: Scorer, *, writes: bool):
        self._path, self._count, self._writes = Path(run_dir) / FILE, count, writes
        self._tokenizer, self._scorer = tokenizer, scorer
        self._file = None

    def begin(self, iteration: int) -> None:
        """Rows after this iteration are of a lost part of the run and are dropped."""
        self.close()
        if self._writes and self._count:
            self._file = open_rows(self._path, iteration)

    def add(
        self, iteration: int, answers: Answers, scores: torch.Tensor, parts: dict[str, torch.Tensor],
        advantages: torch.Tensor,
    ) -> dict[str, str]:  # fmt: skip
        """Writes an iteration's; returns the text for TensorBoard. scores: [n]; parts: of each reward, [n]. advantages:
        [n, t]."""
        if self._file is None:
            return {}
        each = len(answers) // max(len(set(answers.draws)), 1)
        numbers = range(0, len(answers), each)[: self._count]
        rows = [self._row(iteration, answers, scores, parts, advantages, number) for number in numbers]
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        return {TAG: "\n\n".join(map(markdown, rows))}

    def _row(self, iteration: int, answers: Answers, scores, parts, advantages, number: int) -> dict:
        completion = answers.completions[number]
        return {
            "iteration": iteration,
            "prompt": self._tokenizer.decode(answers.prompts[number].tokens),
            "response": self._scorer.text(answers, number),
            "score": float(scores[number]),
            "scores": {name: float(values[number]) for name, values in parts.items()},
            "advantage": float(advantages[number, : len(completion.tokens)].mean()),
            "tokens": len(completion.tokens),
            "finished": completion.finished,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def markdown(row: dict) -> str:
    """One transcript."""
    said = {key: html.escape(row[key], quote=False).replace("|", "\\|").replace("\n", "<br>")
            for key in ("prompt", "response")}  # fmt: skip
    end = "" if row["finished"] else " (cut off)"
    values = [f"{row['score']:.4g}", f"{row['advantage']:.4g}", f"{row['tokens']}{end}", *said.values()]
    return f"| score | advantage | tokens | prompt | response |\n|---|---|---|---|---|\n| {' | '.join(values)} |"
