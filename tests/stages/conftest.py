"""What runs of later stages begin with: answers to sums in several forms."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Row = Callable[[int, int], dict]


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Callable[..., Path]:
    """Writes a file with a row for the sum of every a below 6 and b below `width`; prompts have unequal lengths."""

    def write(name: str, row: Row, width: int = 5) -> Path:
        path = tmp_path_factory.mktemp("data") / name
        rows = [{"prompt": f"{a} and {b}?" * (1 + a % 3), **row(a, b)} for a in range(6) for b in range(width)]
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        return path

    return write


@pytest.fixture(scope="session")
def pairs(sums):
    """Sums, said and not said, of unequal lengths; every third pair is clearly better (a margin)."""

    def row(a: int, b: int) -> dict:
        answers = {"chosen": f"That is {a + b}.", "rejected": "No idea" * (1 + b)}
        return {**answers, "margin": 0.5} if a % 3 == 0 else answers

    return sums("pairs.jsonl", row)


@pytest.fixture(scope="session")
def judged(sums):
    """Single answers to sums, right ones desirable, others not; of unequal lengths."""

    def row(a: int, b: int) -> dict:
        good = (a + b) % 2 == 0
        return {"completion": f"That is {a + b}." if good else "No idea" * (1 + b % 3), "label": good}

    return sums("judged.jsonl", row, width=6)


@pytest.fixture(scope="session")
def ranked(sums):
    """Two to four answers each, best first: the fewer words, the better."""

    def row(a: int, b: int) -> dict:
        return {"responses": [f"That is {a + b}.", "No idea", "No idea" * 3, "No idea " * 6][: 2 + (a + b) % 3]}

    return sums("ranked.jsonl", row)


WAYS_TO_ASK = ("{}", "Say {}", "Repeat {}", "Again: {}")

BRIEF_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ message.content }}{{ eos_token }}{%- endgeneration -%}
{%- else -%}{{ message.content + '\\n' }}{%- endif -%}
{%- endfor -%}
"""
"""Answers follow questions after a new line: rows of ten tokens, where the plain template's have twenty-five."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Prompts that ask for their digit; a label has it."""
    path = tmp_path_factory.mktemp("data") / "digits.jsonl"
    with open(path, "w") as file:
        for way in WAYS_TO_ASK:
            for digit in range(10):
                file.write(json.dumps({"prompt": way.format(digit), "label": str(digit)}) + "\n")
    return path


@pytest.fixture(scope="session")
def beginner(runs, digits, tmp_path_factory):
    """Checkpoints of a model that answers `digits` with a digit and an end, and with the right one once in about five
    times: it was told every digit as an answer to every prompt, the right one with three times the weight of another.

    Weights are drawn wider than usual: with 0.02 and 64 channels, the model learns which tokens are answers long before
    it looks at the prompt, and nothing that a prompt has to do with an answer can be reinforced.
    """
    directory = tmp_path_factory.mktemp("beginner")
    said, template = directory / "said.jsonl", directory / "brief.jinja"
    template.write_text(BRIEF_TEMPLATE)
    with open(said, "w") as file:
        for way in WAYS_TO_ASK:
            for digit in range(10):
                for answer in range(10):
                    row = {"prompt": way.format(digit), "response": str(answer), "weight": 1 + 2 * (answer == digit)}
                    file.write(json.dumps(row) + "\n")
    words = ["model.init_method_std=0.1", "train.train_iters=1", "train.eval_iters=0"]
    assert runs(directory / "drawn", *words) == []
    words = ["stage=sft", "model=from_checkpoint", f"checkpoint.load={directory / 'drawn' / 'checkpoints'}",
             f"tokenizer.chat_template={template}", f"data.path={said}", "data.split='100,0,0'",
             "train.train_iters=100", "train.global_batch_size=100", "train.micro_batch_size=100",
             "train.eval_interval=null", "train.eval_iters=0", "train.log_interval=50", "optim.lr=3e-3",
             "optim.lr_decay_style=constant", "stage.num_samples=0", "stage.batching=padded"]  # fmt: skip
    assert runs(directory / "run", *words) == []
    return directory / "run" / "checkpoints"
