"""Words of the command line to a typed configuration, and what is said where they are wrong."""

import pytest
from support.configs import config_of

from scale_llm.config.compose import compose, compose_with_unset, expand_sweep
from scale_llm.config.errors import UsageError
from scale_llm.config.optim import DecayStyle
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import EvaluateConfig, PretrainConfig
from scale_llm.config.store import GROUPS, SCHEMAS, options


def problems(*words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        compose(list(words))
    return caught.value.problems


def test_defaults_are_those_of_the_dataclasses():
    """Nothing given: every group equals its dataclass, but for precision, which asks the machine."""
    cfg, plain = compose([]), RunConfig(run_dir="")
    assert cfg.precision.auto
    cfg.precision.auto = False
    assert cfg == plain


def test_every_option_composes():
    """The n-th options of all groups together, as a composition takes a third of a second."""
    every = {group: options(group) for group in SCHEMAS}
    for number in range(max(map(len, every.values()))):
        chosen = {group: names[number] for group, names in every.items() if number < len(names)}
        cfg = compose([f"{group}={name}" for group, name in chosen.items()])
        assert all(isinstance(getattr(cfg, group), SCHEMAS[group]) for group in chosen), chosen
        assert chosen.get("model", cfg.model.name) == cfg.model.name, "the option's own file is read"


def test_options_are_listed():
    """Adding an option means defending it here."""
    assert {group: options(group) for group in GROUPS} == {
        "stage": ["dpo", "evaluate", "generate", "grpo", "ppo", "pretrain", "reward", "score", "sft"],
        "model": [
            "demo",
            "from_checkpoint",
            "gpt2_small",
            "llama3_8b",
            "llama_32m",
            "mixtral_8x7b",
            "tiny",
            "tiny_moe",
        ],
        "data": ["embedded"],
        "tokenizer": ["bpe"],
        "train": ["default"],
        "parallel": ["cp2", "distopt", "ep2", "pp2", "pp2_vpp2", "single", "tp2", "tp2_pp2", "tp2_sp"],
        "layout": ["colocated", "hybrid", "split"],
        "reward": ["default"],
        "precision": ["auto", "bf16", "fp16", "fp32", "fp8_blockwise", "fp8_delayed", "fp8_tensorwise", "mxfp8"],
        "peft": ["dora", "lora", "none", "prompt_tuning", "qlora"],
        "optim": ["adam", "adamw", "sgd"],
        "checkpoint": ["default"],
        "health": ["default"],
        "logging": ["default", "plain"],
        "profile": ["none", "nsys", "trace"],
        "cluster": ["local", "local_cpu", "slurm"],
        "experiment": [
            "demo_dpo",
            "demo_evaluate",
            "demo_grpo",
            "demo_ppo",
            "demo_pretrain",
            "demo_reward",
            "demo_sft",
        ],
    }


def test_stage_decides_its_own_keys():
    assert type(compose(["stage=pretrain"]).stage) is PretrainConfig
    cfg = compose(["stage=evaluate", "stage.split=train"])
    assert cfg.stage == EvaluateConfig(split="train")
    assert "split" in problems("stage=pretrain", "stage.split=train")[0]


def test_experiment_is_overridden_by_words():
    cfg = compose(["experiment=demo_pretrain", "model=tiny", "optim.lr=0.5"])
    assert (cfg.model.name, cfg.optim.lr, cfg.parallel.tensor_model_parallel_size) == ("tiny", 0.5, 2)


def test_unset_keys_are_those_nobody_has_set():
    """A word, an option's file or an experiment sets a key also where it says the default."""
    cfg, unset = compose_with_unset(["experiment=demo_sft", "data.path=null", "optim.lr_decay_iters=${train.seed}"])
    assert {"data.path", "optim.lr_decay_iters", "optim.lr", "model.seq_length", "stage.name"}.isdisjoint(unset)
    assert {"data.fields.text", "model.backend", "run_dir", "train.seed", "stage.train_on"} <= unset
    assert cfg.optim.lr_decay_iters == cfg.train.seed == 1234


@pytest.mark.parametrize("spelling", ["WSD", "wsd"])
def test_megatrons_spelling_of_enums(spelling):
    assert compose([f"optim.lr_decay_style={spelling}"]).optim.lr_decay_style is DecayStyle.wsd
    assert compose(["optim.lr_decay_style=inverse-square-root"]).optim.lr_decay_style is DecayStyle.inverse_square_root


def test_precision_said_by_hand_turns_auto_off():
    assert not compose(["precision.bf16=false"]).precision.auto


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train.train_iter=5", "train.train_iters"),
        ("modle=tiny", "model"),
        ("model=tinny", "model=tiny"),
        ("model=null", "unknown option"),
        ("train.lr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("+foo=1", "unknown"),
        ("+model.foo=1", "unknown key"),
        ("+model=tiny", "leave out the +"),
        ("optim.optimizer=adamx", "one of adamw, adam, sgd"),
        ("train.train_iters=many", "int"),
        ("train.train_iters=1,2", "-m"),
        ("tiny", "key=value"),
        ("hydra.run.dir=x", "no effect"),
    ],
)
def test_a_wrong_word_is_named_with_a_remedy(word, hint):
    (problem,) = problems(word)
    assert word.lstrip("+").split("=")[0] in problem and hint in problem


def test_all_wrong_words_at_once():
    assert len(problems("modle=tiny", "train.train_iter=5", "model=tinny", "lr=3")) == 4
    assert len(problems("train.train_iters=x", "optim.lr=y", "optim.optimizer=z")) == 3


def test_sweep_expands_to_the_product():
    points = expand_sweep(["model=tiny,demo", "optim.lr=1e-3,3e-3", "train.seed=1"])
    assert len(points) == 4
    assert ["model=demo", "optim.lr=0.003", "train.seed=1"] in points


WORDS = ["model=tiny_moe", "stage=sft", "precision.bf16=false", "optim.lr=1", "optim.lr_decay_style=WSD",
         "data.path=[0.3,a.txt,0.7,b.jsonl]", "data.split='90,10,0'", "train.rampup_batch_size=[4,2,100]",
         "peft=lora", "peft.target_modules=[q_proj]", "train.train_iters=null", "train.train_epochs=1",
         "tokenizer.path=a/b.json", "data.fields.text=body", "stage.batching=padded"]  # fmt: skip


def test_the_short_cut_of_other_tests_gives_the_same():
    assert config_of(*WORDS) == compose(WORDS)


def test_data_path_takes_lists_and_weights():
    assert compose(["data.path=[0.3,a.txt,0.7,b.jsonl]"]).data.path == [0.3, "a.txt", 0.7, "b.jsonl"]
