"""Points of a sweep: names, directories, the table at the end."""

import json

from scale_llm.launch.runs import compose_run
from scale_llm.launch.sweep import Outcome, last_row, points, print_outcomes


def test_points_are_named_by_what_differs():
    names = [name for name, _ in points(["optim.lr=1e-3,3e-3", "model=tiny,demo", "train.seed=1"])]
    assert names == ["optim.lr=0.001,model=tiny", "optim.lr=0.001,model=demo", "optim.lr=0.003,model=tiny",
                     "optim.lr=0.003,model=demo"]  # fmt: skip
    assert [name for name, _ in points(["train.seed=1"])] == [""]
    assert "/" not in points(["data.path=a/b.txt,c/d.txt"])[0][0]


def test_names_that_would_be_one_directory_or_none():
    names = [name for name, _ in points(["data.path=a/b.txt,a_b.txt,c.txt"])]
    assert len(set(names)) == 3 and names[2] == "data.path=c.txt"
    assert all(name.startswith("data.path=a_b.txt-") for name in names[:2])
    long = [name for name, _ in points([f"data.path={'x' * 300}1,{'x' * 300}2"])]
    assert len(set(long)) == 2 and max(map(len, long)) <= 240
    assert [name for name, _ in points(["train.seed=1,1"])] == [""], "the same run twice"


def test_each_point_has_its_own_run_directory_and_all_share_the_data():
    plans = [compose_run(words, name) for name, words in points(["train.seed=1,2", "run_dir=s"])]
    assert [plan.cfg.run_dir for plan in plans] == ["s/train.seed=1", "s/train.seed=2"]
    assert {plan.cfg.data.cache_dir for plan in plans} == {"s/data"}
    assert plans[0].cfg.checkpoint.save == "s/train.seed=1/checkpoints"
    given = [compose_run(words, name) for name, words in points(["train.seed=1,2", "checkpoint.save=fast"])]
    assert [plan.cfg.checkpoint.save for plan in given] == ["fast/train.seed=1", "fast/train.seed=2"]


def test_table(tmp_path, capsys):
    losses = [{"iteration": 1, "lm loss": 3.0}, {"iteration": 2, "lm loss": 2.5}]
    rows = [*losses, {"iteration": 2, "lm loss validation": 2.6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_row(str(tmp_path)) == {"iteration": 2, "lm loss": 2.5, "lm loss validation": 2.6}
    good = Outcome(point="a=1", run_dir=str(tmp_path), status=0, seconds=3)
    print_outcomes([good, Outcome(point="a=2", run_dir=str(tmp_path / "none"), status=7, seconds=1)])
    out = capsys.readouterr().out
    assert "2.5000" in out and "2.6000" in out and "failed (7)" in out
