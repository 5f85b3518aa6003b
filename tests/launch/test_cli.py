"""What the command prints and returns without starting ranks. The light path imports no torch."""

import subprocess
import sys

import pytest

from scale_llm import __version__
from scale_llm.launch.cli import main, run_command

LIGHT = """
import sys
from scale_llm.launch.cli import run_command
status = run_command(sys.argv[1:])
heavy = [name for name in ("torch", "megatron", "numpy", "pyarrow", "tokenizers") if name in sys.modules]
assert not heavy, heavy
sys.exit(status)
"""


def python(script: str, *arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=cwd)


def failing(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code, capsys.readouterr().err


def test_help_is_light():
    result = python(LIGHT.replace('"torch"', '"hydra", "torch"'), "--help")
    assert result.returncode == 0, result.stderr
    for word in ("experiment=demo_pretrain", "--check", "tp2_sp", "mixtral_8x7b", "tiny*"):
        assert word in result.stdout


def test_check_is_light_and_writes_nothing(tmp_path):
    result = python(LIGHT, "--check", "experiment=demo_pretrain", "run_dir=new", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for fact in ("2 = tensor 2 x pipeline 1", "1,024 tokens", "5,048,576", "starting new"):
        assert fact in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_version(capsys):
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"scale-llm {__version__}\n"


def test_cfg_prints_what_would_run(capsys):
    assert run_command(["--cfg", "job", "experiment=demo_pretrain", "run_dir=x", "train.seed=7"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7" in out and "run_dir: x" in out and "auto: false" in out


def test_misspelt_words_end_with_status_2(capsys):
    status, text = failing(capsys, "--check", "modle=tiny", "train.train_iter=3", "model=tinny")
    assert status == 2
    assert text.splitlines()[0] == "3 errors:" and "model=tiny" in text and "Traceback" not in text


def test_problems_end_with_status_1(capsys):
    status, text = failing(capsys, "--check", "parallel=tp2", "cluster.nproc_per_node=3")
    assert status == 1
    assert text.startswith("2 errors:\n  1. train.train_iters=null") and "\n  2. cluster.nproc_per_node=3" in text


def test_unknown_flag(capsys):
    status, text = failing(capsys, "--chekc")
    assert status == 2 and "--check" in text


def test_data_that_are_not_there_are_found_by_check(capsys, tmp_path):
    status, text = failing(capsys, "--check", "train.train_iters=1", f"data.path={tmp_path}/none.txt")
    assert status == 1 and "none.txt" in text


def test_several_nodes_need_a_starter(capsys):
    status, text = failing(capsys, "--check", "train.train_iters=1", "cluster.nnodes=2", "parallel=tp2")
    assert status == 1 and "cluster.nnodes=2" in text and "srun" in text


def test_sweep_names_the_points_with_problems(capsys):
    status, text = failing(capsys, "-m", "--check", "train.train_iters=1", "model.num_layers=4,5", "parallel=pp2")
    assert status == 1 and "[model.num_layers=5]" in text and "[model.num_layers=4]" not in text


def test_a_sweep_is_shown_or_prepared_without_a_run(capsys, monkeypatch):
    monkeypatch.setattr("scale_llm.launch.runs.execute", None)
    monkeypatch.setattr("scale_llm.launch.preparation.prepare_data", lambda cfg: print(f"data of {cfg.train.seed}"))
    words = ["train.train_iters=1", "train.seed=1,2", "run_dir=s"]
    assert run_command(["-m", "--cfg", "job", *words]) == 0
    out = capsys.readouterr().out
    assert "# train.seed=1\nrun_dir: s/train.seed=1\n" in out and "run_dir: s/train.seed=2\n" in out
    assert run_command(["-m", "--prepare", *words]) == 0
    out = capsys.readouterr().out
    assert "data of 1" in out and "data of 2" in out


def test_a_sweep_under_torchrun_would_run_one_point(capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("scale_llm.launch.join.join_ranks", None)  # would replace this process
    status, text = failing(capsys, "-m", "train.train_iters=1", "train.seed=1,2")
    assert status == 1 and "without torchrun" in text


def test_score_is_a_run_in_fewer_words():
    from scale_llm.config.errors import UsageError
    from scale_llm.launch.score import score_words

    assert score_words(["--check", "ckpt", "a.jsonl", "out", "data.fields.prompt=question"]) == [
        "stage=score", "model=from_checkpoint", "checkpoint.load='ckpt'", "data.path='a.jsonl'", "run_dir='out'",
        "--check", "data.fields.prompt=question",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="scale-llm score runs/reward"):
        score_words(["ckpt", "a.jsonl"])
    misspelt = ["ckpt", "a.jsonl", "out", "data.feilds.prompt=x"]
    assert score_words(misspelt)[-1] == misspelt[-1], "a key, which composition names"


@pytest.mark.parametrize(
    "path", ["s/optim.lr=1e-3,train.seed=2/checkpoints", "a b", "it's", r"c\d", "e\\'f", "x\\", "null"]
)
def test_score_takes_any_path(path):
    from scale_llm.config.overrides import parse
    from scale_llm.launch.score import score_words

    words = score_words([path, "train.seed=3", "a.jsonl", "x=1"])
    values = {override.key_or_group: override.value() for override in parse(words)}
    assert (values["checkpoint.load"], values["run_dir"], values["train.seed"]) == (path, "x=1", 3)
