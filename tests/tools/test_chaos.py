"""tools/chaos.py with a few faults: the run ends as if they had not been, and the report says what they cost."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import environment

ROOT = Path(__file__).resolve().parents[2]


def chaos(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), "--out", str(tmp_path / "report.json"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)


@pytest.mark.slow
def test_a_few_faults(tmp_path):
    """A rank that hangs, a damaged checkpoint, NaN in a gradient."""
    kinds = "stop_rank,flip_byte,nan_gradient"
    result = chaos(tmp_path, "--faults", "3", "--seed", "3", "--kinds", kinds)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] and report["final_weights_equal"]
    assert (report["faults"], report["detected"], report["recovered"]) == (3, 3, 3)
    assert report["most_iterations_lost"] <= report["save_interval"]
    assert {one["kind"] for one in report["list"]} == set(kinds.split(","))
    assert "3 of 3 recovered" in result.stdout and "equal to the last bit" in result.stdout.replace("\n", " ")


def test_a_trace_in_the_weights_is_found(tmp_path, monkeypatch):
    """The comparison itself: one bit of one tensor."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import torch
    from chaos_run.report import compared
    from torch.distributed import checkpoint

    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    for name, change in (("one", 0.0), ("same", 0.0), ("other", 2**-20)):
        changed = {**state, "a": state["a"] + change}
        checkpoint.save(changed, checkpoint_id=tmp_path / name / "iter_0000007", no_dist=True)
    assert compared(tmp_path / "one", tmp_path / "same", 7) == (True, "")
    assert compared(tmp_path / "one", tmp_path / "other", 7) == (False, "a")
    assert compared(tmp_path / "one", tmp_path / "none", 7)[0] is False


def test_faults_are_spread_over_the_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from chaos_run.faults import KINDS, drawn

    planned = drawn(25, list(KINDS), 9, 300, random.Random(1))
    counts = {kind: sum(fault.kind == kind for fault in planned) for kind in KINDS}
    assert set(counts.values()) <= {2, 3} and sum(counts.values()) == 25
    iterations = [fault.iteration for fault in planned]
    assert iterations == sorted(iterations) and 9 <= iterations[0] and iterations[-1] < 295
    assert (
        planned == drawn(25, list(KINDS), 9, 300, random.Random(1)) != drawn(25, list(KINDS), 9, 300, random.Random(2))
    )


@pytest.mark.parametrize("words", [["--kinds", "flood"], ["--faults", "0"]])
def test_bad_words(tmp_path, words):
    result = chaos(tmp_path, *words)
    assert result.returncode == 2 and words[1] in result.stderr
