"""Real comparisons: 300 ShareGPT pairs, of which a fifth is held out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import environment

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "preference_sharegpt_en.json"


@pytest.mark.skipif(not PAIRS.is_file(), reason="real data ../shared/data/preference_sharegpt_en.json is not here")
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_reports_accuracy_with_its_interval_and_what_it_means(tmp_path, base, stage):
    """By the documented command; the words must agree with the interval, whatever it is. The base has a vocabulary of
    few hundred tokens, so that prompts that fill a row are left out and 30 pairs are a fifth."""
    words = [f"experiment=demo_{stage}", f"data.path={PAIRS}", "model.seq_length=512", "data.on_too_long=truncate",
             f"checkpoint.load={base}", f"run_dir={tmp_path / 'run'}", "parallel=single", "cluster.nproc_per_node=1",
             "train.train_iters=8", "train.eval_interval=null", "train.eval_iters=100", "logging.progress=false",
             "cluster.omp_num_threads=1", "model.compile_ops=false"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "scale_llm.launch.cli", *words], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [row[f"{stage} loss"] for row in rows if f"{stage} loss" in row]
    assert len(losses) == 8 and all(0.4 < loss < 1.0 for loss in losses), losses  # learning shows in other tests
    (last,) = [row for row in rows if f"{stage} loss validation" in row]
    low, high = (last[f"rewards/accuracies validation 95% {end}"] for end in ("low", "high"))
    assert low < last["rewards/accuracies validation"] < high
    said = re.search(r"(\d+) of (\d+) held-out pairs in the right order, .*: (.*)", done.stdout)
    assert said is not None, done.stdout[-2000:]
    assert int(said[2]) >= 30 and int(said[1]) / int(said[2]) == pytest.approx(last["rewards/accuracies validation"])
    wanted = "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "not told apart from chance"
    assert said[3].startswith(wanted)
