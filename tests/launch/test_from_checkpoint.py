"""model=from_checkpoint and a Hugging Face directory in checkpoint.load, as far as the launcher: no rank starts."""

import json
import shutil

import pytest

from scale_llm.config import compose, store
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.machine import detect
from scale_llm.config.model import RopeScaling
from scale_llm.config.resolve import resolve
from scale_llm.launch.runs import compose_run, problems

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "eos_token_id": [7, 8],
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A Hugging Face directory without weights: the launcher reads none."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tokens = [{"id": 7, "content": "<|end|>"}]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"a": 0, "b": 1}}}))
    return path


def composed(tmp_path, directory, *words):
    return compose_run([f"checkpoint.load={directory}", f"run_dir={tmp_path / 'run'}", "train.train_iters=1", *words])


def test_model_and_tokenizer_are_taken(tmp_path, directory):
    """Llama 3.2's spelling of RoPE; of two ends of text the first; a training length that fits a machine."""
    plan = composed(tmp_path, directory, "model=from_checkpoint")
    model = plan.cfg.model
    assert (model.num_layers, model.hidden_size, model.num_query_groups, model.kv_channels) == (2, 64, 2, 16)
    assert (model.rotary_base, model.rope_scaling, model.rope_scaling_factor) == (500000, RopeScaling.llama3, 32.0)
    assert not model.untie_embeddings_and_output_weights and model.seq_length == 4096
    assert plan.cfg.tokenizer.path == str(directory) and plan.cfg.tokenizer.eod_token == "<|end|>"
    assert problems(plan) == []


def test_what_the_user_gives_stays(tmp_path, directory):
    plan = composed(tmp_path, directory, "model=from_checkpoint", "model.seq_length=128", "tokenizer.path=/mine")
    assert plan.cfg.model.seq_length == 128 and plan.cfg.tokenizer.path == "/mine"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Writes experiment=mine into a conf/ that is otherwise ours."""
    conf = tmp_path / "conf"
    shutil.copytree(store.conf_dir(), conf)
    monkeypatch.setattr(store, "conf_dir", lambda: conf)
    monkeypatch.setattr(compose, "conf_dir", lambda: conf)

    def write(text):
        head = "# @package _global_\ndefaults: [{override /model: from_checkpoint}, _self_]\n"
        (conf / "experiment" / "mine.yaml").write_text(head + text)

    return write


def test_what_an_experiment_says_stays_even_where_it_is_the_default(tmp_path, directory, experiment):
    """512 tokens, 4 layers and this end of text are the dataclasses' defaults: only the file knows they are meant."""
    experiment("model: {seq_length: 512, num_layers: 4}\ntokenizer: {eod_token: <|endoftext|>}\n")
    cfg = composed(tmp_path, directory, "experiment=mine").cfg
    assert (cfg.model.seq_length, cfg.model.num_layers, cfg.tokenizer.eod_token) == (512, 4, "<|endoftext|>")
    assert (cfg.model.hidden_size, cfg.model.rotary_base, cfg.tokenizer.path) == (64, 500000, str(directory))
    assert cfg.model.name != "from_checkpoint"


def test_words_come_before_the_experiment(tmp_path, directory, experiment):
    experiment("model: {seq_length: 256}\n")
    assert composed(tmp_path, directory, "experiment=mine", "model.seq_length=512").cfg.model.seq_length == 512
    assert composed(tmp_path, directory, "experiment=mine").cfg.model.seq_length == 256


@pytest.mark.parametrize(("stage", "template"), [("pretrain", None), ("evaluate", None), ("sft", "chat.jinja")])
def test_a_chat_template_is_for_conversations(tmp_path, directory, stage, template):
    """Where documents are read, the one that the checkpoint's run was given would be refused."""
    former = compose.compose(["stage=sft", f"tokenizer.path={directory}", "tokenizer.chat_template=chat.jinja"])
    checkpoint = tmp_path / "iter_0000001"
    checkpoint.mkdir()
    (checkpoint / "metadata.json").touch()
    save_config(resolve(former, detect()), checkpoint)
    plan = composed(tmp_path, checkpoint, "model=from_checkpoint", f"stage={stage}")
    assert plan.cfg.tokenizer.chat_template == template and plan.cfg.tokenizer.path == str(directory)
    assert problems(plan) == []


def test_another_function_is_refused_with_every_field(tmp_path, directory):
    plan = composed(tmp_path, directory, "model=from_checkpoint", "model.num_layers=3", "model.norm_epsilon=1e-3")
    found = problems(plan)
    assert [problem.split(":")[0] for problem in found] == ["model.num_layers=3", "model.norm_epsilon=0.001"]


def test_a_reference_of_another_function_is_refused_too(tmp_path, directory):
    """stage.reference_load of DPO, before a rank starts; a run takes its model from checkpoint.load alone."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    (other / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 3}))
    words = ["model=from_checkpoint", "stage=dpo", "model.seq_length=128"]
    assert problems(composed(tmp_path, directory, *words, f"stage.reference_load={directory}")) == []
    (problem,) = problems(composed(tmp_path, directory, *words, f"stage.reference_load={other}"))
    assert problem.startswith(f"model.num_layers=2: stage.reference_load={other} has 3; give a stage.reference_load")


def test_positions_of_a_checkpoint_change_by_name_alone(tmp_path, directory):
    """Of a checkpoint of ours, as an import makes one: a model group that has no stretched positions is another
    function of the same shapes. A longer context is made by who says so."""
    plan = composed(tmp_path, directory, "model=from_checkpoint", "model.window_size=64")
    saved = tmp_path / "saved" / "iter_0000000"
    saved.mkdir(parents=True)
    (saved / "metadata.json").touch()
    save_config(plan.cfg, saved)
    words = ["model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
             "model.num_query_groups=2", "model.vocab_size=300", "model.rotary_base=500000",
             "model.max_position_embeddings=131072", "model.seq_length=128",
             "model.untie_embeddings_and_output_weights=false", f"tokenizer.path={directory}"]  # fmt: skip
    found = problems(composed(tmp_path, saved, *words))
    assert [problem.split(": ")[0] for problem in found] == ["model.rope_scaling=none", "model.window_size=null"]
    assert f"checkpoint.load={saved} has llama3" in found[0] and "give model.rope_scaling=llama3" in found[0]
    assert problems(composed(tmp_path, saved, *words, "model.rope_scaling=linear", "model.window_size=null")) == []
    (problem,) = problems(composed(tmp_path, saved, *words, "model.rope_scaling=llama3", "model.window_size=64"))
    assert problem.startswith("model.rope_scaling_factor=8.0: ") and "has 32.0" in problem
    assert problems(composed(tmp_path, saved, "model=from_checkpoint", "model.seq_length=128")) == []


def test_from_checkpoint_needs_one(tmp_path):
    with pytest.raises(UserError, match="give checkpoint.load=DIR"):
        compose_run(["model=from_checkpoint", f"run_dir={tmp_path}"])


def test_a_model_that_is_not_supported(tmp_path, directory):
    (directory / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UserError, match="MambaForCausalLM is not supported"):
        composed(tmp_path, directory, "model=from_checkpoint")
