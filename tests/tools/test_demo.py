"""`make demo`'s program, whole: it is the first thing a newcomer runs."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STAGES = ("curate", "pretrain", "evaluate", "sft", "reward", "dpo", "ppo", "grpo")


def demo(root: Path) -> tuple[str, float]:
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--root", str(root)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, time.monotonic() - began


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return root, *demo(root)


def test_loss_falls_below_60_percent_of_its_start(finished):
    root, _, _ = finished
    losses = [json.loads(line).get("lm loss") for line in (root / "pretrain" / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.6 * losses[0]
    evaluation = json.loads((root / "evaluate" / "evaluation.json").read_text())
    assert evaluation["lm loss"] < 0.7 * losses[0]
    assert 0 < evaluation["bits per byte"] < 8


def test_later_stages_learn(finished):
    """Fine-tuning predicts answers better; both kinds of preference hold on pairs that were not trained on."""
    root, _, _ = finished

    def values(stage, key):
        rows = [json.loads(line) for line in (root / stage / "metrics.jsonl").open()]
        return [row[key] for row in rows if key in row]

    tuned = values("sft", "lm loss validation")
    assert tuned[-1] < 0.98 * tuned[0] and values("sft", "lm loss")[-1] < 0.92 * values("sft", "lm loss")[0]
    assert abs(values("dpo", "dpo loss")[0] - math.log(2)) < 1e-3
    for stage in ("reward", "dpo"):
        assert values(stage, f"{stage} loss validation")[-1] < 0.62, stage
        assert values(stage, "rewards/accuracies validation 95% low")[-1] > 0.5, f"{stage}: no better than chance"
    for stage in ("ppo", "grpo"):
        held_out, sampled = values(stage, "critic/score/mean validation"), values(stage, "critic/score/mean")
        assert held_out[-1] > held_out[0] and sum(sampled[-5:]) > sum(sampled[:5]), f"{stage}: {held_out}, {sampled}"
    assert values("grpo", "critic/score/mean validation")[-1] > 0.3, "answers of the length that is asked for score 1"
    assert "| reference | before | after |" in (root / "sft" / "samples.md").read_text()


def test_the_corpus_is_curated(finished):
    """The library's shortest test modules are copies of each other, its codecs near copies."""
    root, output, _ = finished
    report = json.loads((root / "curate" / "report.json").read_text())
    removed = report["documents_in"] - report["documents_out"]
    assert 20 < removed < 0.2 * report["documents_in"]
    assert f"{report['documents_out']:,} of {report['documents_in']:,} documents kept" in output.replace("\n", " ")
    assert str(root / "curate" / "documents") in (root / "pretrain" / "config.yaml").read_text()
    assert (root / "curate" / "report.html").is_file()


def test_table_and_picture(finished):
    root, output, _ = finished
    for word in ("stage", "steps", "first loss", "last loss", "tokens/s", "pretrain", "evaluate", "340"):
        assert word in output, output
    assert output.count("reward 0.") >= 2, "ppo and grpo say their reward in place of a loss"
    picture = (root / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_second_run_reuses_everything(finished):
    root, _, seconds = finished
    before = {path: path.stat().st_mtime_ns for path in (root / "pretrain").rglob("*") if path.is_file()}
    output, again = demo(root)
    assert all(f"{stage}: done before" in output for stage in STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert again < seconds / 3
