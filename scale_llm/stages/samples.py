"""What the model answers to a few held-out prompts, before and after training, side by side."""

import html
import json
from pathlib import Path

import numpy as np
import torch.distributed as dist

from scale_llm.config.io import write_text
from scale_llm.config.stage import SftConfig
from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.stages.context import RunContext

FILE = "samples.jsonl"
TAG = "samples"


class Samples:
    """Prompts of the first held-out sequences; a prompt is all before the last stretch of tokens that count.

    run_dir/samples.jsonl has a row for each: prompt, reference, before, after; samples.md is the same to read.
    """

    def __init__(self, run: RunContext, sequences: TokenSequences, numbers: np.ndarray):
        """sequences: of which the assistant's tokens count; numbers: of those that are held out."""
        stage, cfg = run.cfg.stage, run.cfg
        assert isinstance(stage, SftConfig)
        self._directory, self._longest = Path(cfg.run_dir), stage.max_new_tokens
        self._writes = dist.get_rank() == dist.get_world_size() - 1
        self._prompts: list[list[int]] = []
        self._references: list[list[int]] = []
        self._before: list[str] | None = None
        self.remarks: list[str] = []
        self._tokenizer = Tokenizer.load(run.prepared.tokenizer_path, cfg.tokenizer.eod_token)
        for number in numbers:
            if len(self._prompts) == stage.num_samples:
                break
            prompt, reference = cut(sequences[int(number)])
            if prompt and len(prompt) + stage.max_new_tokens <= cfg.model.seq_length:
                self._prompts.append(prompt)
                self._references.append(reference)
        if stage.num_samples and len(numbers) and not self._prompts:
            self.remarks = [
                f"no samples: none of {len(numbers)} validation conversations has a marked answer after a prompt "
                f"with room for stage.max_new_tokens={stage.max_new_tokens} in model.seq_length={cfg.model.seq_length}"
            ]

    def before(self, engine: Engine) -> dict[str, str]:
        """Answers of the base model."""
        if not self._prompts:
            return {}
        self._before = self._answers(engine)
        return self._written([""] * len(self._prompts))

    def after(self, engine: Engine) -> dict[str, str]:
        """Answers of the model as it is now."""
        return self._written(self._answers(engine)) if self._prompts else {}

    def _answers(self, engine: Engine) -> list[str]:
        stop = frozenset(stop_tokens(self._tokenizer, self._references))
        params = SamplingParams(temperature=0.0, max_new_tokens=self._longest, stop=stop)
        longest = max(map(len, self._prompts)) + self._longest
        generator = Generator(engine, max_batch_size=len(self._prompts), max_seq_length=longest)
        found = generator.generate(self._prompts, params, [0] * len(self._prompts))
        return [self._text(completion.tokens) for completion in found]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode([token for token in tokens if token < self._tokenizer.vocab_size])

    def _kept(self) -> list[str]:
        """The first answers of a run that is resumed."""
        path = self._directory / FILE
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        known = {row.get("prompt"): row.get("before", "") for row in rows}
        return [known.get(self._text(prompt), "") for prompt in self._prompts]

    def _written(self, after: list[str]) -> dict[str, str]:
        """Writes both files, and returns the text for TensorBoard."""
        before = self._before or self._kept()
        rows = [
            {"prompt": self._text(prompt), "reference": self._text(reference), "before": old, "after": new}
            for prompt, reference, old, new in zip(self._prompts, self._references, before, after, strict=True)
        ]
        text = "\n\n".join(markdown(number, row) for number, row in enumerate(rows, start=1))
        if self._writes:
            write_text(self._directory / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_text(self._directory / "samples.md", text + "\n")
        return {TAG: text}


def stop_tokens(tokenizer: Tokenizer, references: list[list[int]]) -> set[int]:
    """Ends of text and of turns: the last special token of each reference, as templates may write a line's end after
    it, and a reference that was cut off ends in any token."""
    special = tokenizer.special_ids
    ends = (next((token for token in reversed(reference) if token in special), None) for reference in references)
    return {tokenizer.eod} | {token for token in ends if token is not None}


def cut(sequence) -> tuple[list[int], list[int]]:
    """Tokens before the last stretch that counts, and that stretch; nothing where no token counts."""
    places = np.flatnonzero(sequence.trained)
    if not len(places):
        return [], []
    end = int(places[-1]) + 1
    gaps = np.flatnonzero(np.diff(places) > 1)
    start = int(places[gaps[-1] + 1]) if len(gaps) else int(places[0])
    return np.asarray(sequence.tokens[:start]).tolist(), np.asarray(sequence.tokens[start:end]).tolist()


def markdown(number: int, row: dict[str, str]) -> str:
    """One sample with its texts side by side."""
    quoted = {
        key: html.escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>") for key, text in row.items()
    }
    return (
        f"**{number}** {quoted['prompt']}\n\n| reference | before | after |\n|---|---|---|\n"
        f"| {quoted['reference']} | {quoted['before']} | {quoted['after']} |"
    )
