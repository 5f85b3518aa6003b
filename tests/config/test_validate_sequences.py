"""What a fine-tuning run is refused for before anything starts."""

import pytest
from support.configs import config_of

from scale_llm.config.machine import Machine
from scale_llm.config.model import Backend
from scale_llm.config.resolve import resolve
from scale_llm.config.stage import Batching
from scale_llm.config.validate import problems_of

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False, compiler=True)


def found(tmp_path, *words):
    """Problems of a run that is fine but for the words; the checkpoint is not looked into."""
    load = tmp_path / "base" / "iter_0000010"
    load.mkdir(parents=True, exist_ok=True)
    (load / "metadata.json").write_text("{}")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"added_tokens": [], "model": {"vocab": {"a": 0, "b": 1}}}')
    fine = [f"run_dir={tmp_path / 'run'}", "stage=sft", f"checkpoint.load={load}", f"tokenizer.path={tokenizer}",
            "train.train_iters=5", "cluster=local_cpu"]  # fmt: skip
    cfg = resolve(config_of(*fine, *words), MACHINE)
    return problems_of(cfg, MACHINE)


def test_a_sound_run_has_no_problem(tmp_path):
    assert found(tmp_path) == []
    assert found(tmp_path, "train.train_iters=null", "train.train_epochs=1.5", "peft=lora") == []


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["checkpoint.load=null"], ["checkpoint.load=null", "nothing to fine-tune"]),
        (["model.head=reward"], ["model.head=reward", "language_model"]),
        (["stage.label_smoothing=1.5"], ["stage.label_smoothing=1.5", "share"]),
        (["stage.neftune_noise_alpha=-1"], ["stage.neftune_noise_alpha=-1", "0 or larger"]),
        (["stage.num_samples=-1"], ["stage.num_samples=-1"]),
        (["stage.max_new_tokens=0"], ["stage.max_new_tokens=0", "at least one token", "stage.num_samples=0"]),
        (["stage.max_tokens_per_micro_batch=900"], ["stage.max_tokens_per_micro_batch=900", "token_budget"]),
        (
            ["stage.batching=token_budget", "stage.max_tokens_per_micro_batch=100"],
            ["stage.max_tokens_per_micro_batch=100", "model.seq_length=512"],
        ),
        (["model.backend=local"], ["stage.batching=packed", "model.backend=local"]),
        (["train.train_epochs=1"], ["train.train_iters=5", "train.train_epochs=1", "2 lengths"]),
        (["train.train_iters=null", "train.train_epochs=0"], ["train.train_epochs=0", "larger than 0"]),
        (["peft=lora", "peft.target_modules=[query]"], ["peft.target_modules", "query", "linear_qkv", "q_proj"]),
        (["peft=lora", "peft.target_modules=[]"], ["peft.target_modules=[]", "nothing"]),
        (["peft=lora", "model.swiglu=false", "peft.target_modules=[gate_proj]"], ["gate_proj", "up_proj"]),
        (["peft=lora", "peft.rank=0"], ["peft.rank=0", "at least 1"]),
        (["peft=lora", "peft.alpha=0"], ["peft.alpha=0"]),
        (["peft=dora", "model.backend=local", "stage.batching=padded"], ["peft.method=dora", "model.backend=torch"]),
        (["peft=lora", "peft.dropout=1"], ["peft.dropout=1", "share"]),
        (["peft=prompt_tuning", "peft.num_virtual_tokens=512"], ["peft.num_virtual_tokens=512", "512"]),
        (["peft=none", "peft.quantize_base=nf4"], ["peft.quantize_base=nf4", "qlora"]),
    ],
)
def test_a_fault_is_named_with_its_remedy(tmp_path, words, hints):
    (problem,) = found(tmp_path, *words)
    assert all(hint in problem for hint in hints), problem


def test_all_faults_at_once(tmp_path):
    assert len(found(tmp_path, "stage.label_smoothing=2", "peft=lora", "peft.rank=0", "peft.target_modules=[x]")) == 3


def test_pretraining_has_neither_epochs_nor_adapters(tmp_path):
    problems = found(tmp_path, "stage=pretrain", "train.train_iters=null", "train.train_epochs=1", "peft=lora")
    assert any("train.train_epochs=1.0" in p and "stage=sft" in p for p in problems)
    assert any("peft.method=lora" in p for p in problems)


def test_what_is_left_open_is_settled(tmp_path):
    cfg = resolve(config_of("stage=sft", "stage.batching=token_budget", "train.micro_batch_size=3"), MACHINE)
    assert cfg.stage.batching is Batching.token_budget
    assert cfg.stage.max_tokens_per_micro_batch == 3 * cfg.model.seq_length
    assert cfg.checkpoint.finetune
    cut = resolve(config_of("stage=sft", "parallel.context_parallel_size=2"), MACHINE)
    assert cut.model.backend is Backend.torch and cfg.model.backend is Backend.auto


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["stage.beta=0"], ["stage.beta=0", "larger than 0"]),
        (["stage.label_smoothing=0.2"], ["stage.label_smoothing=0.2", "cdpo"]),
        (["stage.loss=cdpo", "stage.label_smoothing=0.6"], ["stage.label_smoothing=0.6", "below 0.5"]),
        (["stage.sft_coeff=-1"], ["stage.sft_coeff=-1"]),
        (["peft=prompt_tuning"], ["peft.method=prompt_tuning", "lora"]),
        (
            ["stage.batching=token_budget", "stage.max_tokens_per_micro_batch=600"],
            ["stage.max_tokens_per_micro_batch=600", "1024"],
        ),
    ],
)
def test_faults_of_preference_optimisation(tmp_path, words, hints):
    (problem,) = found(tmp_path, "stage=dpo", *words)
    assert all(hint in problem for hint in hints), problem
