"""Planted web documents, curated once a session by the tool itself."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import planted

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
SHARDS = 4

pytest.importorskip("datatrove", reason="the packages of curation are not installed: pip install .[curate]")


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs tools/curate_data.py with these words."""

    def run(*words: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, **options)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "curate_data.py"), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words of a curation of c4_web.jsonl with planted faults, in SHARDS files; all but output and tasks."""
    for name in ("c4_web.jsonl", "gsm8k_train.jsonl"):
        if not (SHARED / name).is_file():
            pytest.skip(f"real data ../shared/data/{name} is not here")
    top = tmp_path_factory.mktemp("planted")
    (top / "in").mkdir()
    rows = planted.rows(SHARED / "c4_web.jsonl", SHARED / "gsm8k_train.jsonl")
    share = -(-len(rows) // SHARDS)
    for number in range(SHARDS):
        part = rows[number * share : (number + 1) * share]
        (top / "in" / f"{number}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    questions = (SHARED / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)
    (top / "questions.jsonl").write_text("".join(planted.with_questions(questions, rows)))
    (top / "curses.txt").write_text("\n".join(planted.CURSES))
    return [
        "curate=web", f"input={top / 'in'}", "curate.shard_megabytes=0.25", "curate.report.label=fault",
        f"curate.decontaminate.against={top / 'questions.jsonl'}", f"curate.toxicity.words={top / 'curses.txt'}",
        "curate.url.lists=false", "curate.url.blocked_domains=[casino.example]",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def curated(web: list[str], tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two tasks at once."""
    output = tmp_path_factory.mktemp("curated") / "out"
    tool(*web, f"output={output}", "tasks=2")
    return output


def documents(output: Path) -> list[dict]:
    """Rows of the output in their order."""
    return [json.loads(line) for file in sorted(output.glob("documents/*")) for line in gzip.open(file)]


def removed(output: Path) -> list[dict]:
    """Rows of the removed ones, phase after phase."""
    return [json.loads(line) for file in sorted(output.glob("removed/*/*")) for line in gzip.open(file)]
