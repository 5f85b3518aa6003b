"""Which checkpoint a run begins from, at its first start and at all others."""

import os

import pytest
from support.configs import config_of

from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.machine import Machine
from scale_llm.config.pins import pin, pin_problems
from scale_llm.config.resolve import resolve

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False)
TRACKER = "latest_checkpointed_iteration.txt"
LORA, SFT = "peft=lora", "stage=sft"


def checkpoint(directory, iteration):
    """One more checkpoint, the newest."""
    path = directory / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "metadata.json").touch()
    (directory / TRACKER).write_text(str(iteration))
    return str(path)


@pytest.fixture
def start(tmp_path):
    """Starts the run of these words; with what it begins from."""

    def run(*words, save=True):
        cfg = resolve(config_of("train.train_iters=10", f"run_dir={tmp_path}/run", *words), MACHINE)
        pin(cfg)
        (tmp_path / "run").mkdir(exist_ok=True)
        save_config(cfg, tmp_path / "run")
        if save:
            (tmp_path / "run" / "metrics.jsonl").touch()
        return cfg

    return run


def test_a_run_that_goes_on_keeps_what_it_began_from(tmp_path, start, monkeypatch):
    first = checkpoint(tmp_path / "base", 10)
    load = f"checkpoint.load={tmp_path}/base"
    assert start(SFT, LORA, load, save=False).checkpoint.load == first
    second = checkpoint(tmp_path / "base", 20)
    assert start(SFT, LORA, load).checkpoint.load == second, "it had not got to a step"
    checkpoint(tmp_path / "base", 30)
    assert start(SFT, LORA, load).checkpoint.load == second
    monkeypatch.chdir(tmp_path)
    assert start(SFT, LORA, "checkpoint.load=base").checkpoint.load == second, "the same place"
    again = start(SFT, LORA, f"checkpoint.load={second}")
    pin(again)
    assert again.checkpoint.load == second


def test_what_trains_nothing_takes_the_newest(tmp_path, start):
    for iteration in (10, 20):
        newest = checkpoint(tmp_path / "base", iteration)
        assert start("stage=evaluate", f"checkpoint.load={tmp_path}/base").checkpoint.load == newest


def test_huggingface_and_release_are_named_whole(tmp_path, start, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert start("checkpoint.load=hf", save=False).checkpoint.load == str(tmp_path / "hf")
    (tmp_path / "megatron" / "release").mkdir(parents=True)
    (tmp_path / "megatron" / "release" / "common.pt").touch()
    (tmp_path / "megatron" / TRACKER).write_text("release")
    for _ in range(2):
        cfg = start("checkpoint.load=megatron", save=False)
        assert cfg.checkpoint.load == str(tmp_path / "megatron" / "release")
        pin(cfg)


def test_one_place_is_one_checkpoint_whatever_the_key(tmp_path, start):
    first = checkpoint(tmp_path / "base", 10)
    words = ["stage=dpo", f"checkpoint.load={tmp_path}/base"]
    start(*words)
    checkpoint(tmp_path / "base", 20)
    cfg = start(*words, f"stage.reference_load={tmp_path}/base")
    assert cfg.checkpoint.load == cfg.stage.reference_load == first


def test_what_is_gone_is_a_problem_where_it_is_read_again(tmp_path, start):
    first = checkpoint(tmp_path / "base", 10)
    load = f"checkpoint.load={tmp_path}/base"
    start(SFT, LORA, load)
    checkpoint(tmp_path / "base", 20)
    os.rename(first, tmp_path / "elsewhere")
    with pytest.raises(UserError) as error:
        start(SFT, LORA, load)
    (problem,) = error.value.problems
    assert problem.startswith(load) and first in problem and "not there any more; put it back" in problem


def test_what_is_not_read_again_may_go(tmp_path, start):
    first = checkpoint(tmp_path / "base", 10)
    load = f"checkpoint.load={tmp_path}/base"
    start(SFT, load)
    newest = checkpoint(tmp_path / "base", 20)
    os.rename(first, tmp_path / "elsewhere")
    assert start(SFT, load).checkpoint.load == newest


def test_another_place_is_a_problem_where_it_is_read_again(tmp_path, start):
    for name in ("base", "other"):
        checkpoint(tmp_path / name, 10)
    words = ["stage=ppo", f"checkpoint.load={tmp_path}/base", f"reward.load={tmp_path}/base"]
    start(*words)
    cfg = resolve(
        config_of("train.train_iters=10", f"run_dir={tmp_path}/run", *words, f"reward.load={tmp_path}/other"), MACHINE
    )
    found = pin_problems(cfg)
    assert [problem.split(":")[0] for problem in found] == [f"reward.load={tmp_path}/other"]
    assert f"{tmp_path}/base/iter_0000010" in found[0] and "another run_dir" in found[0]
    cfg.reward.load, cfg.checkpoint.load = f"{tmp_path}/base", f"{tmp_path}/other"
    (problem,) = pin_problems(cfg)
    assert problem.startswith("checkpoint.load=") and "its reference" in problem
    cfg.reward.load, cfg.checkpoint.load = None, f"{tmp_path}/base"
    (problem,) = [found for found in pin_problems(cfg) if "its reward model" in found]
    assert problem.startswith("reward.load=null: ") and f"give reward.load={tmp_path}/base/iter_0000010" in problem


def test_a_reward_model_that_the_run_did_not_begin_with(tmp_path, start):
    checkpoint(tmp_path / "base", 10)
    words = ["stage=grpo", f"checkpoint.load={tmp_path}/base", "reward.function=length"]
    start(*words)
    words += ["train.train_iters=10", f"run_dir={tmp_path}/run", f"reward.load={tmp_path}/base"]
    (problem,) = pin_problems(resolve(config_of(*words), MACHINE))
    assert "has its reward model from no checkpoint; leave reward.load out" in problem
