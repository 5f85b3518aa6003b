"""What lies in a run directory before ranks start."""

import json

import pytest

from scale_llm.config.compose import compose
from scale_llm.config.errors import UserError
from scale_llm.config.io import load_config
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.config.run import RunConfig
from scale_llm.launch.run_directory import greeting, prepare_run_dir, tracker_problems

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False)


def config(tmp_path, *words: str):
    return resolve(compose([f"run_dir={tmp_path}/run", "train.train_iters=3", *words]), MACHINE)


def test_contents(tmp_path):
    cfg = config(tmp_path)
    prepare_run_dir(cfg)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "commit", "config.yaml", "logs", "tensorboard"]
    assert load_config(tmp_path / "run") == cfg
    facts = json.loads((tmp_path / "run" / "commit").read_text())
    assert facts["torch"] and facts["scale_llm"]


def test_first_line(tmp_path):
    cfg = config(tmp_path)
    assert greeting(cfg) == f"starting {tmp_path}/run"
    prepare_run_dir(cfg)
    tracker = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    (tracker.parent / "iter_0000040").mkdir()
    tracker.write_text("40")
    assert greeting(cfg) == f"resuming {tmp_path}/run at iteration 40"


@pytest.mark.parametrize("text", ["", "forty", "60", None])
def test_a_tracker_that_names_nothing_stops_no_resume(tmp_path, text):
    """The ranks look for the newest whole checkpoint; that the tracker cannot be read at all is a problem."""
    cfg = config(tmp_path)
    prepare_run_dir(cfg)
    tracker = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    (tracker.parent / "iter_0000040").mkdir()
    if text is not None:
        tracker.write_text(text)
    assert tracker_problems(cfg) == []
    assert greeting(cfg).startswith(f"resuming {tmp_path}/run at its newest whole checkpoint ({tracker}")
    tracker.unlink(missing_ok=True)
    tracker.mkdir()
    assert "make it readable" in tracker_problems(cfg)[0]


def test_a_directory_that_cannot_be_made_is_an_error_of_its_key():
    """Also for root, whom no permission stops."""
    with pytest.raises(UserError, match="run_dir=/proc/nowhere: cannot be written"):
        prepare_run_dir(RunConfig(run_dir="/proc/nowhere"))
