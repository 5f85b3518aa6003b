"""A run of PPO that is killed goes on as if nothing had been."""

import os
import random
import signal
import time

import pytest
from support.policy_words import words
from support.runs import rows

LAYOUT = ["cluster.nproc_per_node=2", "layout=split"]
SIX = ["stage=ppo", "train.train_iters=6", "train.eval_iters=0", "checkpoint.save_interval=1"]


@pytest.mark.slow
def test_killed_at_a_random_moment(runs, beginner, digits, tmp_path):
    """Within generation, scoring, an update or a save: the same command gives the metrics and transcripts of a run that
    was left alone."""
    said = words(beginner, digits, *SIX, *LAYOUT)
    assert runs(tmp_path / "whole", *said) == []
    seconds = random.SystemRandom().uniform(0, 1.5)
    process = runs.start(tmp_path / "killed", *said)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # the pipe ends with the last process that holds it: none is left behind
    runs.command(tmp_path / "killed", *said)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole"), f"killed {seconds:.2f} s after the second iteration"
    texts = [(tmp_path / name / "transcripts.jsonl").read_text() for name in ("killed", "whole")]
    assert texts[0] == texts[1]
