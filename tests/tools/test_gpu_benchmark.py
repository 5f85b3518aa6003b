"""tools/benchmark.py gpu at a tiny size on a CPU: every section that needs no GPU gives its rows, and a section that
fails, or does not end, loses nothing of the others."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from support.ranks import environment

ROOT = Path(__file__).resolve().parents[2]

BROKEN = """
import time
from benchmarks.rows import faster

def fails(**arguments):
    yield [(faster("before", 2.0, 1.0, "peer", "tokens/s"), "over 1.0")], ""
    raise MemoryError("CUDA out of memory")

def never_ends(**arguments):
    yield [(faster("before", 3.0, 1.0, "peer", "tokens/s"), "")], ""
    time.sleep(1000)
"""


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The module, with two sections more."""
    (tmp_path / "broken_sections.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from benchmarks import gpu

    broken = {
        "fails": gpu.Section(builder="broken_sections:fails", budget_seconds=100),
        "never_ends": gpu.Section(builder="broken_sections:never_ends", budget_seconds=6),
    }
    monkeypatch.setattr(gpu, "SECTIONS", {**broken, **gpu.SECTIONS})
    return gpu


def measured(gpu, path: Path, *sections: str) -> dict:
    chosen = Namespace(sections=list(sections), directory=None, seconds=None, scale="tiny", device="cpu", out=path)
    assert gpu.run(chosen) is None
    return {**json.loads(path.with_suffix(".sections.json").read_text()), "rows": json.loads(path.read_text())}


@pytest.mark.slow
def test_all_sections(gpu, tmp_path):
    """train_8b is train_1b with another size."""
    sections = ("fails", "train_1b", "never_ends", "fp8", "rollout", "checkpoint", "convert")
    found = measured(gpu, tmp_path / "results.json", *sections)
    assert {name: part["status"] for name, part in found["sections"].items()} == {
        "fails": "failed", "train_1b": "measured", "never_ends": "out of time", "fp8": "skipped",
        "rollout": "measured", "checkpoint": "measured", "convert": "measured",
    }, found["sections"]  # fmt: skip
    assert found["sections"]["fails"]["reason"] == "MemoryError: CUDA out of memory"
    assert "GPU" in found["sections"]["fp8"]["reason"]
    assert {"date", "card", "driver", "cuda", "torch", "megatron-core", "transformer-engine"} <= found["header"].keys()
    fields = {"section", "measure", "ours", "peer", "peer_name", "ratio", "unit", "aim"}
    assert all(row.keys() == fields for row in found["rows"])
    # The cost of a save is a difference of times, which may be below 0 where a step takes milliseconds
    values = [row[key] for row in found["rows"] if "cost" not in str(row) for key in ("ours", "peer", "ratio")]
    assert len(values) > 20 and min(values) > 0, found["rows"]
    names = {name: [row["measure"] for row in found["rows"] if row["section"] == name] for name in sections}
    assert names["fails"] == names["never_ends"] == ["before"], "what they had measured by then"
    assert len(names["train_1b"]) == 5 and len(names["rollout"]) == 2 and len(names["checkpoint"]) == 4
    assert [name.split()[0] for name in names["convert"][:2]] == ["import", "export"]
    assert not list(tmp_path.glob(".results*"))


def test_time_runs_out(gpu, tmp_path, monkeypatch):
    """What is not reached says so."""
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0.0)
    found = measured(gpu, tmp_path / "results.json", "fails")
    assert found["sections"]["fails"]["status"] == "not measured" and "time" in found["sections"]["fails"]["reason"]


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", "--out", str(tmp_path / "results.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert "no NVIDIA GPU" in result.stderr and "machine with one" in result.stderr, result.stderr
